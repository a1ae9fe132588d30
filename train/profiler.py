"""--profile N: what a few steps of a run spend their time on."""
import torch
from torch.profiler import ProfilerActivity, profile, schedule


def start_profiler(steps, folder, ends):
    """Records `steps` steps after the first two, all operators on the CPU and kernels on a GPU, and writes them to
    trace.json in `folder`, for chrome://tracing or ui.perfetto.dev -> function to call after each step.

    steps: 0 records nothing. ends: ExitStack that ends the recording where a run ends before.
    """
    if not steps:
        return lambda: None

    def write(profiler):
        temporary = folder / "trace.json.tmp"
        profiler.export_chrome_trace(str(temporary))
        temporary.rename(folder / "trace.json")
        print(f"wrote a trace of steps to {folder / 'trace.json'}", flush=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    when = schedule(wait=1, warmup=1, active=steps, repeat=1)
    return ends.enter_context(profile(activities=activities, schedule=when, on_trace_ready=write)).step
