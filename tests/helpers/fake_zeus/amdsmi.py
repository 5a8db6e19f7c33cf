"""The function of amdsmi that names a GPU."""


def amdsmi_get_gpu_device_uuid(handle: int) -> str:
    """Return the UUID of a GPU."""
    return f"uuid-{handle}"
