export PYTHONPATH=$PWD OMP_NUM_THREADS=1
P=/work/main/.venv/bin/python
$P -m tests.attack --only command_lines --every 9
$P -m tests.attack --only malformed_files --every 8
$P -m tests.attack --only hostile_policies --every 5
$P -m tests.attack --only faults --every 6
$P -m tests.attack --only kill_points --every 9
