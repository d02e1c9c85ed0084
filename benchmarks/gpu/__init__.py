"""The parts of ``benchmarks/gpu_report.py``, each of which runs in a process of its own."""
