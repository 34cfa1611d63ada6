"""How near do the decode kernels come to the GPU's copy bandwidth? CUDA only.

Random weights of a true shape, widths 1 / ternary / 2 / 3 in shares of 15 / 45 / 99 / 33. CUDA graphs run
through layers of which at least 4 times the L2 cache is read between two visits to the same one; each replay
draws fresh routing. The kernels are compared with float64 before they are timed. Bytes are codes,
scales and offsets of the experts that were chosen, each counted once. Appends rows to results/kernels_decode.csv.

    python benchmarks/kernels_decode.py [--shape olmoe mixtral] [--batch 1 4 16] [--replays 50]
    python benchmarks/kernels_decode.py --sweep           a table of cuts instead, nothing appended
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.kernels.activation import SILU, Activation
from gemq.kernels.decode.launch import launch_down, launch_linears, launch_up
from gemq.kernels.decode.packed_arguments import FusedLinears, PackedArguments
from gemq.kernels.decode.tuning import TensorCoreConfig, VectorConfig
from gemq.kernels.modules import PackedMatrices, PackedMatrix
from gemq.quant.grid import encode
from gemq.quant.widths import Width
from record import RESULTS, append, environment
from shapes import random_codes

FILE = RESULTS / "kernels_decode.csv"
SHARES = {Width.ONE_BIT: 15, Width.TERNARY: 45, Width.TWO_BIT: 99, Width.THREE_BIT: 33}
GROUP = 128
L2_TIMES = 4
DTYPE = torch.bfloat16
GATE = Activation(SILU, gated=True)


class Shape(NamedTuple):
    hidden: int
    inner: int
    experts: int
    slots: int
    linears: tuple[tuple[tuple[int, ...], int], ...]  # (rows of those in one launch, columns) of attention


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8, (((2048,), 2048), ((2048, 2048, 2048), 2048))),
    "mixtral": Shape(4096, 14336, 8, 2, (((4096,), 4096), ((4096, 1024, 1024), 4096))),
}
CUTS = (
    *(VectorConfig(rows, warps, 64) for rows, warps in ((16, 4), (32, 4), (32, 8), (64, 8))),
    *(VectorConfig(rows, warps, 128) for rows, warps in ((32, 4), (64, 4), (64, 8), (128, 8))),
    *(VectorConfig(rows, 4, 128, registers) for rows, registers in ((32, 96), (64, 128))),
)
LINEAR_CUTS = (
    *(
        VectorConfig(rows, warps, columns)
        for columns in (64, 128)
        for rows, warps in ((4, 1), (8, 2), (16, 4), (32, 4))
    ),
    TensorCoreConfig(16, 8, 4),
    TensorCoreConfig(32, 4, 4),
)


def random_matrix(rows: int, columns: int, width: Width) -> PackedMatrix:
    """Random codes on the GPU; weights of about 1 / sqrt(columns)."""
    codes = random_codes(
        rows, columns // GROUP, width, GROUP, torch.Generator("cuda").manual_seed(random.getrandbits(32))
    )
    grid = (rows, columns // GROUP)
    scales = (torch.rand(grid, device="cuda") + 0.5) * columns**-0.5
    offsets = torch.randn(grid, device="cuda") * columns**-0.5
    return PackedMatrix(codes, *encode(scales, offsets, width.max_code), width)


class Layer(NamedTuple):
    up: PackedArguments
    down: PackedArguments
    packed: tuple[PackedMatrices, PackedMatrices]
    bytes: Tensor  # [E] of an expert's two matrices

    @classmethod
    def random(cls, shape: Shape, shares: dict[Width, int]) -> Layer:
        widths = random.choices(list(shares), list(shares.values()), k=shape.experts)
        sizes = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        packed = [PackedMatrices([random_matrix(*s, w) for w in widths]) for s in sizes]
        up, down = (
            PackedArguments(m.codes, m.scales, m.offsets, m.table, None, m.rows, GROUP, [w.levels for w in SHARES])
            for m in packed
        )
        total = [sum(w.matrix_bytes(*s, GROUP) for s in sizes) for w in widths]
        return cls(up, down, (packed[0], packed[1]), torch.tensor(total, device="cuda"))


class Work:
    """Layers, inputs and routing of one shape and batch; ``route`` draws new routing."""

    def __init__(self, shape: Shape, layers: list[Layer], batch: int) -> None:
        self.shape, self.layers, self.batch = shape, layers, batch
        self.x = [torch.randn(batch, shape.hidden, dtype=DTYPE, device="cuda") for _ in layers]
        self.index = torch.empty(len(layers), batch, shape.slots, dtype=torch.int64, device="cuda")
        self.weights = torch.rand(len(layers), batch, shape.slots, device="cuda").to(DTYPE)
        self.h = torch.randn(batch, shape.slots, shape.inner, dtype=DTYPE, device="cuda")
        self.route()

    def route(self) -> tuple[float, float]:
        """Fresh routing for all layers -> bytes that a layer reads, busiest expert over the mean, both averages."""
        scores = torch.rand(*self.index.shape[:2], self.shape.experts, device="cuda")
        self.index.copy_(scores.topk(self.shape.slots, dim=-1).indices)
        loads = torch.stack([torch.bincount(i.flatten(), minlength=self.shape.experts) for i in self.index])
        read = sum((layer.bytes * (load > 0)).sum() for layer, load in zip(self.layers, loads, strict=True))
        mean = self.batch * self.shape.slots / self.shape.experts
        return float(read) / len(self.layers), float(loads.amax(1).float().mean()) / mean

    def up(self, i: int, cut: Any = None) -> Tensor:
        return launch_up(self.x[i], self.index[i], self.layers[i].up, GATE, cut)

    def down(self, i: int, cut: Any = None, h: Tensor | None = None) -> Tensor:
        return launch_down(self.h if h is None else h, self.index[i], self.weights[i], self.layers[i].down, cut)

    def up_and_down(self, i: int, up: Any = None, down: Any = None) -> Tensor:
        """[T, K, H]: the sum over K is another kernel's."""
        return self.down(i, down, self.up(i, up))


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


def build(shape: Shape, shares: dict[Width, int]) -> list[Layer]:
    """Enough layers that batch 1 reads 4 times the L2 cache before it comes back to one."""
    layers = [Layer.random(shape, shares)]
    step = float(layers[0].bytes.float().mean()) * shape.slots
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return layers + [Layer.random(shape, shares) for _ in range(max(3, -int(-L2_TIMES * l2 // step) - 1))]


def check(work: Work, call: Callable[[int], Tensor]) -> float:
    """Kernels against float64 arithmetic of the same weights on the first layer: the relative error."""
    (up, down), x = work.layers[0].packed, work.x[0].double()
    output = call(0).sum(1).double()
    truth = torch.zeros_like(output)
    for e in work.index[0].unique().tolist():
        token, slot = torch.where(work.index[0] == e)
        h = GATE(x[token] @ up.dequantize(e, torch.float64).T).to(DTYPE).double()
        y = h @ down.dequantize(e, torch.float64).T
        truth.index_add_(0, token, y * work.weights[0][token, slot, None].double())
    error = ((output - truth).norm() / truth.norm()).item()
    # One rounding of the activations between the products: 2^-9 each at most.
    assert error < 2**-8, f"kernels are wrong: relative error {error:.2e}"
    return error


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


def row(kernel: str, name: str, batch: int, seconds: list[float], read: float, copy: float, **columns: Any) -> dict:
    quantiles = statistics.quantiles(seconds, n=5)
    median = statistics.median(seconds)
    result = {
        "kernel": kernel,
        "shape": name,
        "batch": batch,
        "p20_us": quantiles[0] * 1e6,
        "p50_us": median * 1e6,
        "p80_us": quantiles[3] * 1e6,
        "bytes": round(read),
        "gb_per_s": read / median / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "share": read / median / copy,
        "max_over_mean": "",
        **columns,
        **environment(),
    }
    shown = {k: result[k] for k in ("kernel", "shape", "batch", "p50_us", "gb_per_s", "share")}
    print("  " + " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()), flush=True)
    return result


class LinearWork:
    """Distinct 4-bit matrices of attention, those of one launch together, at least four times the L2 cache in all."""

    def __init__(self, rows: tuple[int, ...], columns: int, batch: int) -> None:
        self.read = sum(Width.FOUR_BIT.matrix_bytes(count, columns, GROUP) for count in rows)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.matrices = []
        for _ in range(-(-L2_TIMES * l2 // self.read) + 1):
            matrices = [random_matrix(count, columns, Width.FOUR_BIT) for count in rows]
            codes, scales, offsets = zip(*(matrix.tensors() for matrix in matrices), strict=True)
            self.matrices.append(FusedLinears(codes, scales, offsets, [], 16, GROUP))
        self.x = torch.randn(batch, columns, dtype=DTYPE, device="cuda")

    def seconds(self, replays: int, cut: Any = None) -> list[float]:
        def all_matrices() -> None:
            for m in self.matrices:
                launch_linears(self.x, m, cut)

        graph = capture(all_matrices)
        for _ in range(2):
            timed(graph)
        return [timed(graph) / len(self.matrices) for _ in range(replays)]


def bench_linears(name: str, shape: Shape, batch: int, replays: int, copy: float) -> Iterator[dict]:
    """4-bit attention projections."""
    for rows, columns in shape.linears:
        work = LinearWork(rows, columns, batch)
        yield row(
            f"linear {'+'.join(map(str, rows))}x{columns} 4 bit", name, batch, work.seconds(replays), work.read, copy
        )


def bench(names: list[str], batches: list[int], replays: int, save: bool) -> None:
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e9:.0f} GB/s")
    for name in names:
        shape = SHAPES[name]
        layers = build(shape, SHARES)
        print(f"{name}: {len(layers)} layers")
        for batch in batches:
            work = Work(shape, layers, batch)
            started = time.perf_counter()
            work.up_and_down(0)
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            print(f"  batch {batch}: first call {first:.2f} s, relative error {check(work, work.up_and_down):.1e}")
            seconds, read, load = measure(work, work.up_and_down, replays)
            rows = [row("experts", name, batch, seconds, read, copy, max_over_mean=load)]
            rows += bench_linears(name, shape, batch, replays, copy)
            for cells in rows if save else ():
                append(FILE, cells)
        del layers, work
        torch.cuda.empty_cache()


def sweep(names: list[str], batches: list[int], replays: int) -> None:
    """Microseconds of up and down for every cut, then both together in the best ones; then linears."""
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e9:.0f} GB/s")
    for name in names:
        layers = build(SHAPES[name], SHARES)
        for batch in batches:
            print(f"{name} batch {batch}: rows warps columns registers -> us up, us down", flush=True)
            sweep_work(Work(SHAPES[name], layers, batch), replays, copy)
        del layers
        torch.cuda.empty_cache()
        for width in SHARES:
            layers = build(SHAPES[name], {width: 1})
            work = Work(SHAPES[name], layers, 1)
            up, down = (statistics.median(measure(work, call, replays)[0]) * 1e6 for call in (work.up, work.down))
            print(f"{name} all {width} bits, batch 1: up {up:.2f} us, down {down:.2f} us", flush=True)
            del layers, work
            torch.cuda.empty_cache()
        for rows, columns in SHAPES[name].linears:
            for batch in (1, *(b for b in batches if b > 1)):
                linears = LinearWork(rows, columns, batch)
                cells = []
                for cut in LINEAR_CUTS:
                    seconds = statistics.median(linears.seconds(replays, cut))
                    cells.append(f"{'x' * isinstance(cut, TensorCoreConfig)}{tuple(cut[:3])} {seconds * 1e6:.2f}")
                print(f"linear {'+'.join(map(str, rows))}x{columns}, batch {batch}: " + "; ".join(cells), flush=True)


def sweep_work(work: Work, replays: int, copy: float) -> None:
    best: dict[str, tuple[float, VectorConfig]] = {}
    for cut in CUTS:
        error = check(work, partial(work.up_and_down, up=cut, down=cut))
        cells = []
        for which, call in (("up", work.up), ("down", work.down)):
            times, _, _ = measure(work, partial(call, cut=cut), replays)
            candidate = (statistics.median(times), cut)
            cells.append(f"{candidate[0] * 1e6:7.2f}")
            best[which] = min(best.get(which, candidate), candidate)
        print(
            "  " + " ".join(f"{n or 0:3d}" for n in cut[:4]) + " " + " ".join(cells) + f"  error {error:.1e}",
            flush=True,
        )
    up, down = best["up"][1], best["down"][1]
    print(f"  best: {up} {down}")
    calls: dict[str, Callable[[int], Any]] = {
        "best": partial(work.up_and_down, up=up, down=down),
        "best, each after the other": partial(
            work.up_and_down, up=up._replace(pdl=False), down=down._replace(pdl=False)
        ),
        "as configured": work.up_and_down,
    }
    for label, variant in calls.items():
        check(work, variant)
        times, read, _ = measure(work, variant, replays)
        seconds = statistics.median(times)
        print(f"  {label}: {seconds * 1e6:.2f} us, {read / seconds / copy:.1%} of copies", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="time every cut instead; nothing is appended")
    parser.add_argument("--no-save", action="store_true", help="append nothing to results/kernels_decode.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device: there is none here")
    torch.manual_seed(0)
    random.seed(0)
    if args.sweep:
        sweep(args.shape, args.batch, min(args.replays, 12))
    else:
        bench(args.shape, args.batch, args.replays, not args.no_save)


if __name__ == "__main__":
    main()
