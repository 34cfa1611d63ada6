"""How near do the decode kernels come to the GPU's copy bandwidth? CUDA only.

Random weights of a true shape, widths 1 / ternary / 2 / 3 in shares of 15 / 45 / 99 / 33. CUDA graphs run
through layers of which at least 4 times the L2 cache is read between two visits to the same one; each replay
draws fresh routing. The kernels are compared with the reference before they are timed. Bytes are codes,
scales and offsets of the experts that were chosen, each counted once. Appends rows to results/kernels.csv.

    python benchmarks/kernels.py [--shape olmoe mixtral] [--batch 1 4 16] [--replays 50]
    python benchmarks/kernels.py --sweep           a table of block sizes and warps instead, nothing appended
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.kernels.activation import SILU, Activation
from gemq.kernels.packed import PackedMatrices, PackedMatrix
from gemq.quant.widths import bytes_per_group, matrix_bytes

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
SHARES = {1: 15, 1.6: 45, 2: 99, 3: 33}
GROUP = 128
L2_TIMES = 4
DTYPE = torch.bfloat16
GATE = Activation(SILU, gated=True)


class Shape(NamedTuple):
    hidden: int
    inner: int
    experts: int
    slots: int
    linears: tuple[tuple[int, int], ...]  # (rows, columns) of attention


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8, ((2048, 2048),)),
    "mixtral": Shape(4096, 14336, 8, 2, ((4096, 4096), (1024, 4096))),
}
# block_rows, split, num_warps, num_stages, max_registers
Cut = tuple[int, int, int, int, int | None]
CUTS: tuple[Cut, ...] = (
    (32, 4, 4, 1, None),
    (32, 4, 4, 2, None),
    (32, 4, 4, 3, None),
    (32, 4, 4, 4, None),
    (32, 4, 4, 3, 128),
    (32, 2, 2, 1, None),
    (32, 2, 2, 3, None),
    (32, 2, 2, 3, 128),
    (32, 1, 1, 1, None),
    (32, 8, 4, 1, None),
    (32, 8, 8, 1, None),
    (32, 8, 8, 3, None),
    (64, 4, 4, 1, None),
    (16, 4, 4, 1, None),
    (16, 4, 4, 3, None),
    (16, 8, 4, 1, None),
    (16, 8, 4, 3, None),
    (16, 8, 8, 1, None),
    (16, 8, 8, 3, None),
)


def random_matrix(rows: int, columns: int, width: float) -> PackedMatrix:
    """Random codes on the GPU; weights of about 1 / sqrt(columns)."""
    code_bytes = columns // GROUP * bytes_per_group(width, GROUP)
    codes = torch.randint(0, 243 if width == 1.6 else 256, (rows, code_bytes), dtype=torch.uint8, device="cuda")
    grid = (rows, columns // GROUP)
    scales = (torch.rand(grid, device="cuda") + 0.5) * columns**-0.5
    return PackedMatrix(codes, scales.half(), (torch.randn(grid, device="cuda") * columns**-0.5).half())


class Layer(NamedTuple):
    up: PackedMatrices
    down: PackedMatrices
    bytes: Tensor  # [E] of an expert's two matrices

    @classmethod
    def random(cls, shape: Shape) -> Layer:
        widths = random.choices(list(SHARES), list(SHARES.values()), k=shape.experts)
        sizes = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        up, down = (PackedMatrices([random_matrix(*s, w) for w in widths], widths, GROUP) for s in sizes)
        total = [sum(matrix_bytes(*s, w, GROUP) for s in sizes) for w in widths]
        return cls(up, down, torch.tensor(total, device="cuda"))

    def arguments(self, which: str) -> tuple[Any, ...]:
        m = getattr(self, which)
        return m.codes, m.scales, m.offsets, m.table, None, m.rows, m.group_size, m.levels


class Work:
    """Layers, inputs and routing of one shape and batch; ``replay`` draws new routing."""

    def __init__(self, shape: Shape, layers: list[Layer], batch: int) -> None:
        self.shape, self.layers, self.batch = shape, layers, batch
        self.x = [torch.randn(batch, shape.hidden, dtype=DTYPE, device="cuda") for _ in layers]
        self.index = torch.empty(len(layers), batch, shape.slots, dtype=torch.int64, device="cuda")
        self.weights = torch.rand(len(layers), batch, shape.slots, device="cuda").to(DTYPE)
        self.h = torch.randn(batch, shape.slots, shape.inner, dtype=DTYPE, device="cuda")
        self.arrivals = torch.zeros(len(layers), shape.hidden, dtype=torch.int32, device="cuda")
        self.route()

    def route(self) -> tuple[float, float]:
        """Fresh routing for all layers -> bytes that a layer reads, busiest expert over the mean, both averages."""
        scores = torch.rand(*self.index.shape[:2], self.shape.experts, device="cuda")
        self.arrivals.zero_()
        self.index.copy_(scores.topk(self.shape.slots, dim=-1).indices)
        loads = torch.stack([torch.bincount(i.flatten(), minlength=self.shape.experts) for i in self.index])
        read = sum((layer.bytes * (load > 0)).sum() for layer, load in zip(self.layers, loads, strict=True))
        mean = self.batch * self.shape.slots / self.shape.experts
        return float(read) / len(self.layers), float(loads.amax(1).float().mean()) / mean

    def experts(self, i: int) -> Tensor:
        from gemq.kernels import decode

        layer = self.layers[i]
        up, down = layer.arguments("up"), layer.arguments("down")
        sizes = (*up[5:], *down[6:])
        return decode.decode_experts(self.x[i], self.index[i], self.weights[i], *up[:5], *down[:5], *sizes, *GATE)

    def up(self, i: int, config: Any = None, blocks: int = 64) -> Tensor:
        from gemq.kernels import launch

        arguments = self.layers[i].arguments("up")
        kwargs = {"activation": GATE, "arrivals": self.arrivals[i, :blocks], "config": config}
        return launch.launch_up(self.x[i], self.index[i], *arguments, **kwargs)

    def down(self, i: int, config: Any = None, h: Tensor | None = None) -> Tensor:
        """Alone it relies on ``route`` for zeros in ``arrivals``."""
        from gemq.kernels import launch

        arguments = self.layers[i].arguments("down")
        h = self.h if h is None else h
        kwargs = {"arrivals": self.arrivals[i], "config": config}
        return launch.launch_down(h, self.index[i], self.weights[i], *arguments, **kwargs)

    def both(self, i: int, up: Any, down: Any) -> Tensor:
        return self.down(i, down, self.up(i, up, -(-self.shape.hidden // down.block_rows)))


def capture(calls: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


def timed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    graph = capture(lambda: target.copy_(source))
    for _ in range(3):
        timed(graph)
    return 2 * source.numel() / statistics.median(timed(graph) for _ in range(20))


def build(shape: Shape) -> list[Layer]:
    """Enough layers that batch 1 reads 4 times the L2 cache before it comes back to one."""
    layers = [Layer.random(shape)]
    step = float(layers[0].bytes.float().mean()) * shape.slots
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return layers + [Layer.random(shape) for _ in range(max(3, -int(-L2_TIMES * l2 // step) - 1))]


def check(work: Work) -> None:
    """Kernels against the reference on the first layer, in float64 arithmetic of the same weights."""
    layer, x = work.layers[0], work.x[0].double()
    mine = work.experts(0).double()
    truth = torch.zeros_like(mine)
    for e in work.index[0].unique().tolist():
        token, slot = torch.where(work.index[0] == e)
        h = GATE(x[token] @ layer.up.dequantize(e, torch.float64).T).to(DTYPE).double()
        y = h @ layer.down.dequantize(e, torch.float64).T
        truth.index_add_(0, token, y * work.weights[0][token, slot, None].double())
    error = ((mine - truth).norm() / truth.norm()).item()
    # One rounding of the output, and of the activations between the products: 2^-9 each at most.
    assert error < 2**-8, f"kernels are wrong: relative error {error:.2e}"
    print(f"  relative error {error:.1e} against float64")


def measure(work: Work, call: Callable[[int], Any], replays: int) -> tuple[list[float], float, float]:
    """Seconds a layer of each replay, mean bytes a layer, mean of maximum over mean load."""

    def all_layers() -> None:
        for i in range(len(work.layers)):
            call(i)

    graph = capture(all_layers)
    for _ in range(3):
        timed(graph)
    seconds, reads, loads = [], [], []
    for _ in range(replays):
        read, load = work.route()
        torch.cuda.synchronize()
        seconds.append(timed(graph) / len(work.layers))
        reads.append(read)
        loads.append(load)
    return seconds, statistics.mean(reads), statistics.mean(loads)


def row(kernel: str, name: str, batch: int, seconds: list[float], read: float, copy: float, **more: Any) -> dict:
    quantiles = statistics.quantiles(seconds, n=5)
    rate = read / statistics.median(seconds)
    result = {
        "kernel": kernel,
        "shape": name,
        "batch": batch,
        "p20_us": f"{quantiles[0] * 1e6:.2f}",
        "p50_us": f"{statistics.median(seconds) * 1e6:.2f}",
        "p80_us": f"{quantiles[3] * 1e6:.2f}",
        "bytes": round(read),
        "gb_per_s": f"{rate / 1e9:.0f}",
        "copy_gb_per_s": f"{copy / 1e9:.0f}",
        "share": f"{rate / copy:.3f}",
        "max_over_mean": "",
        **more,
        **versions(),
    }
    print("  " + " ".join(f"{k}={result[k]}" for k in ("kernel", "batch", "p50_us", "bytes", "gb_per_s", "share")))
    return result


def versions() -> dict[str, str]:
    import triton

    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": head + ("+" if changes else ""),
    }


def append(rows: list[dict]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def bench_linears(name: str, shape: Shape, batch: int, replays: int, copy: float) -> Iterator[dict]:
    """4-bit attention projections."""
    from gemq.kernels import decode

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    for rows, columns in shape.linears:
        read = matrix_bytes(rows, columns, 4, GROUP)
        matrices = [random_matrix(rows, columns, 4) for _ in range(-(-L2_TIMES * l2 // read) + 1)]
        grids = [tuple(grid.view(torch.int16) for grid in m[1:]) for m in matrices]
        x = torch.randn(batch, columns, dtype=DTYPE, device="cuda")

        def all_matrices(x: Tensor = x, matrices: list = matrices, grids: list = grids) -> None:
            for m, grid in zip(matrices, grids, strict=True):
                decode.decode_linear(x, m.codes, *grid, None, 16, GROUP)

        graph = capture(all_matrices)
        seconds = [timed(graph) / len(matrices) for _ in range(replays)]
        yield row(f"linear {rows}x{columns} 4 bit", name, batch, seconds, read, copy)


def bench(names: list[str], batches: list[int], replays: int, save: bool) -> None:
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e9:.0f} GB/s")
    for name in names:
        shape = SHAPES[name]
        layers = build(shape)
        print(f"{name}: {len(layers)} layers")
        rows = []
        for batch in batches:
            work = Work(shape, layers, batch)
            started = time.perf_counter()
            work.experts(0)
            torch.cuda.synchronize()
            print(f"  batch {batch}: first call {time.perf_counter() - started:.2f} s")
            check(work)
            seconds, read, load = measure(work, work.experts, replays)
            rows.append(row("experts", name, batch, seconds, read, copy, max_over_mean=f"{load:.2f}"))
            rows += bench_linears(name, shape, batch, replays, copy)
        if save:
            append(rows)
        del layers, work
        torch.cuda.empty_cache()


def compile_cut(job: tuple[str, int, Cut, bool]) -> None:
    """Leaves a cut's kernels in Triton's cache, without running them. For a process of its own."""
    from triton.runtime.jit import JITFunction

    from gemq.kernels import launch

    name, batch, cut, pdl = job
    shape, config = SHAPES[name], launch.Config(*cut, pdl)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    x = torch.empty(batch, shape.hidden, dtype=DTYPE, device="cuda")
    index = torch.empty(batch, shape.slots, dtype=torch.int64, device="cuda")
    codes, grid = (torch.empty(64, dtype=dtype, device="cuda") for dtype in (torch.uint8, torch.int16))
    table = torch.empty(shape.experts, 3, dtype=torch.int64, device="cuda")
    arrivals = torch.empty(-(-shape.hidden // config.block_rows), dtype=torch.int32, device="cuda")
    packed = (codes, grid, grid, table, None)
    levels = [2, 3, 4, 8]
    h = launch.launch_up(x, index, *packed, 2 * shape.inner, GROUP, levels, GATE, arrivals, config)
    launch.launch_down(h, index, x[:, : shape.slots].clone(), *packed, shape.hidden, GROUP, levels, arrivals, config)


def sweep(names: list[str], batches: list[int], replays: int, jobs: int) -> None:
    """Microseconds of up and down for every cut, then both together in the best ones."""

    combinations = [(*job, False) for job in itertools.product(names, batches, CUTS)]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.map(compile_cut, combinations, chunksize=2)
    print(f"compiled {len(combinations)} cuts in {time.perf_counter() - started:.0f} s")
    copy = copy_bandwidth()
    for name in names:
        layers = build(SHAPES[name])
        for batch in batches:
            print(f"{name} batch {batch}: block_rows split num_warps num_stages max_registers -> us up, us down")
            sweep_work(Work(SHAPES[name], layers, batch), replays, copy)
        del layers
        torch.cuda.empty_cache()


def sweep_work(work: Work, replays: int, copy: float) -> None:
    from triton.runtime.errors import OutOfResources

    from gemq.kernels import launch

    check(work)
    best: dict[str, tuple[float, Any]] = {}
    for cut in CUTS:
        config, cells = launch.Config(*cut), []
        for which, call in (("up", work.up), ("down", work.down)):
            try:
                call(0, config)
                times, _, _ = measure(work, partial(call, config=config), replays)
            except OutOfResources:
                cells.append("      -")
                continue
            found = (statistics.median(times), config)
            cells.append(f"{found[0] * 1e6:7.2f}")
            best[which] = min(best.get(which, found), found)
        print("  " + " ".join(f"{n or 0:3d}" for n in cut) + " " + " ".join(cells), flush=True)
    up, down = best["up"][1], best["down"][1]
    print(f"  best: {up} {down}")
    calls: dict[str, Callable[[int], Any]] = {
        "best": partial(work.both, up=up, down=down),
        "best with pdl": partial(work.both, up=up._replace(pdl=True), down=down._replace(pdl=True)),
        "as configured": work.experts,
    }
    for label, both in calls.items():
        expected = work.experts(0).float()
        difference = (both(0).float() - expected).norm() / expected.norm()
        assert difference < 2**-8, f"{label}: {difference:.1e} away"  # another order of sums
        times, read, _ = measure(work, both, replays)
        seconds = statistics.median(times)
        print(f"  {label}: {seconds * 1e6:.2f} us, {read / seconds / copy:.1%} of copies", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="time every block size instead; nothing is appended")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile for --sweep")
    parser.add_argument("--no-save", action="store_true", help="append nothing to results/kernels.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device: there is none here")
    torch.manual_seed(0)
    random.seed(0)
    if args.sweep:
        sweep(args.shape, args.batch, min(args.replays, 12), args.jobs)
    else:
        bench(args.shape, args.batch, args.replays, not args.no_save)


if __name__ == "__main__":
    main()
