/* A stand-in for NVIDIA's libnvidia-ml.so.1: as many GPUs as a test asks for, telling whatever it sets.
 *
 * The real pynvml drives it. Build with -DNO_ENERGY_COUNTER for a library from before the energy counter.
 * fake_set(what, gpu, value) and fake_set_text(what, gpu, text) change the state; NAME_error holds the
 * return code of the call NAME. FAKE_NVML_GPUS and FAKE_NVML_INIT_ERROR set the state at start-up.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { MOST_GPUS = 8, POWER_INSTANT = 186 };

typedef struct {
    char uuid[96], name[96];
    unsigned bus;
    int64_t energy_mj, power_mw, instant_mw, limit_mw, busy_percent, used_bytes, total_bytes, mig;
    int64_t energy_error, power_error, instant_error, limit_error, busy_error, memory_error, all_error;
} Gpu;

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type, returned;
    union { double d; uint32_t ui; uint64_t ull; } value;
} FieldValue;

typedef struct {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, pci_device, pci_subsystem;
    char bus_id[32];
} Pci;

static Gpu gpus[MOST_GPUS];
static int64_t count = 1, started = 0, init_error = 0, power_calls = 0;

void fake_reset(int64_t n) {
    memset(gpus, 0, sizeof gpus);
    count = n, init_error = 0, power_calls = 0;
    for (int i = 0; i < MOST_GPUS; i++) {
        Gpu *gpu = &gpus[i];
        snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-%c%c000000-0000-0000-0000-00000000000%d", 'a' + i, 'a' + i, i);
        snprintf(gpu->name, sizeof gpu->name, "Fake H200");
        gpu->bus = 10 + i;
        gpu->energy_mj = 5000000, gpu->power_mw = 300000, gpu->limit_mw = 700000;
        gpu->busy_percent = 50, gpu->used_bytes = 2000, gpu->total_bytes = 8000;
        gpu->instant_error = NOT_SUPPORTED;
    }
}

static int64_t *number(const char *what, int gpu) {
    Gpu *g = &gpus[gpu];
    struct { const char *name; int64_t *at; } table[] = {
        {"energy_mj", &g->energy_mj}, {"power_mw", &g->power_mw}, {"instant_mw", &g->instant_mw},
        {"limit_mw", &g->limit_mw}, {"busy_percent", &g->busy_percent}, {"mig", &g->mig},
        {"used_bytes", &g->used_bytes}, {"total_bytes", &g->total_bytes},
        {"energy_error", &g->energy_error}, {"power_error", &g->power_error},
        {"instant_error", &g->instant_error}, {"limit_error", &g->limit_error},
        {"busy_error", &g->busy_error}, {"memory_error", &g->memory_error}, {"all_error", &g->all_error},
        {"init_error", &init_error}, {"started", &started}, {"power_calls", &power_calls},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, what)) return table[i].at;
    return NULL;
}

int fake_set(const char *what, int gpu, int64_t value) {
    if (!strcmp(what, "bus")) return gpus[gpu].bus = (unsigned)value, 0;
    int64_t *at = number(what, gpu);
    return at ? (*at = value, 0) : -1;
}

int64_t fake_get(const char *what, int gpu) { return *number(what, gpu); }

void fake_set_text(const char *what, int gpu, const char *text) {
    char *at = strcmp(what, "uuid") ? gpus[gpu].name : gpus[gpu].uuid;
    snprintf(at, sizeof gpus[gpu].name, "%s", text);
}

__attribute__((constructor)) static void load(void) {
    const char *n = getenv("FAKE_NVML_GPUS"), *error = getenv("FAKE_NVML_INIT_ERROR");
    fake_reset(n ? atoi(n) : 1);
    init_error = error ? atoi(error) : 0;
}

static int state(const Gpu *gpu, int64_t error) {
    if (started <= 0) return UNINITIALIZED;
    return (int)(gpu->all_error ? gpu->all_error : error);
}

#define ANSWER(gpu, error) do { int code = state(gpu, error); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!init_error) started++;
    return (int)init_error;
}
int nvmlShutdown(void) { return started > 0 ? (started--, SUCCESS) : UNINITIALIZED; }
const char *nvmlErrorString(int code) { (void)code; return "fake error"; }

int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)count; return started > 0 ? SUCCESS : UNINITIALIZED; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu **gpu) {
    if (i >= count) return INVALID_ARGUMENT;
    *gpu = &gpus[i];
    return SUCCESS;
}
/* The slots behind the last GPU serve as MIG slices: they are found by UUID only. */
int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **gpu) {
    for (int i = 0; i < MOST_GPUS; i++)
        if (!strcmp(gpus[i].uuid, uuid)) return *gpu = &gpus[i], SUCCESS;
    return NOT_FOUND;
}
int nvmlDeviceGetName(Gpu *gpu, char *text, unsigned n) {
    return snprintf(text, n, "%s", gpu->name), SUCCESS;
}
int nvmlDeviceGetUUID(Gpu *gpu, char *text, unsigned n) {
    return snprintf(text, n, "%s", gpu->uuid), SUCCESS;
}
int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu->bus;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *now, unsigned *pending) {
    *now = *pending = (unsigned)gpu->mig;
    return SUCCESS;
}
#ifndef NO_ENERGY_COUNTER
int nvmlDeviceGetTotalEnergyConsumption(Gpu *gpu, unsigned long long *mj) {
    ANSWER(gpu, gpu->energy_error);
    *mj = (unsigned long long)gpu->energy_mj;
    return SUCCESS;
}
#endif
int nvmlDeviceGetPowerUsage(Gpu *gpu, unsigned *mw) {
    power_calls++;
    ANSWER(gpu, gpu->power_error);
    *mw = (unsigned)gpu->power_mw;
    return SUCCESS;
}
int nvmlDeviceGetFieldValues(Gpu *gpu, int n, FieldValue *values) {
    ANSWER(gpu, 0);
    for (int i = 0; i < n; i++) {
        values[i].returned = values[i].field == POWER_INSTANT ? (uint32_t)gpu->instant_error : NOT_SUPPORTED;
        values[i].type = 1, values[i].value.ui = (uint32_t)gpu->instant_mw;
    }
    return SUCCESS;
}
int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, unsigned *mw) {
    ANSWER(gpu, gpu->limit_error);
    *mw = (unsigned)gpu->limit_mw;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(Gpu *gpu, unsigned *rates) {
    ANSWER(gpu, gpu->busy_error);
    rates[0] = (unsigned)gpu->busy_percent, rates[1] = 0;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(Gpu *gpu, unsigned long long *memory) {
    ANSWER(gpu, gpu->memory_error);
    memory[0] = (unsigned long long)gpu->total_bytes;
    memory[1] = (unsigned long long)(gpu->total_bytes - gpu->used_bytes);
    memory[2] = (unsigned long long)gpu->used_bytes;
    return SUCCESS;
}
