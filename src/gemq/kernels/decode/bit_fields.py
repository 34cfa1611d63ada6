"""Operands of the tensor cores from packed bytes, in registers (Triton device functions).

Codes become floats without a conversion. A field of a byte is moved to the top of the mantissa bits in a float's low
byte, and the high byte is a constant, so that the 16-bit float reads ``bias + code / factor``. This takes about one
instruction per code. Products with x then contain bias times the sum of x, which offsets need anyway. bfloat16 has 7
mantissa bits in its low byte, whose top bit is the last of the exponent. float16 has 8 there and 2 in the high byte.
Ternary digits always have the same position in the float.

The inline assembly is NVIDIA's. PORTABLE uses ordinary arithmetic, for the interpreter and other GPUs. Tuples are
concatenated with +, since Triton does not support unpacking.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from gemq.kernels.triton_types import Tile

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
SPLIT = tl.constexpr(2)
PORTABLE = tl.constexpr(3)
"""Operands: bfloat16, float16, float32 as a sum of three bfloat16, and float32 without tensor cores."""


@triton.constexpr_function
def _shift_line(target: str, source: str, shift: int):
    """Return the instruction that shifts a register to the right, or to the left if ``shift`` is negative."""
    instruction = "shr" if shift > 0 else "shl"
    return f"{instruction}.b32 {target}, {source}, {abs(shift)};"


@triton.constexpr_function
def plane_asm(bits: int, operand: int, high: int):
    """Return PTX that turns four bytes of a plane into floats.

    Args:
        bits: bits of a field
        operand: BF16 or FP16 (SPLIT as BF16)
        high: the floats' high byte

    Returns:
        Assembly with the bytes in its last operand. Its outputs are two registers of two floats for each of the
        8 / bits fields.
    """
    fields = 8 // bits
    target = 8 - bits if operand == FP16 else 7 - bits  # lowest bit of the field in the float's low byte
    exponent = 0 if operand == FP16 else 0x80808080  # the exponent's last bit
    mask = (((1 << bits) - 1) << target) * 0x01010101
    lines = [".reg .b32 t;"]
    for i in range(fields):
        shift = i * bits - target
        lines.append(_shift_line("t", f"${2 * fields}", shift))
        lines.append(f"and.b32 t, t, {mask:#010x};")
        lines.append(f"or.b32 t, t, {exponent:#010x};")
        lines.append(f"prmt.b32 ${2 * i}, t, {high * 0x01010101:#010x}, 0x4140;")
        lines.append(f"prmt.b32 ${2 * i + 1}, t, {high * 0x01010101:#010x}, 0x4342;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def three_bit_asm(operand: int):
    """Return PTX that turns four bytes of 3-bit codes into floats.

    $8 has four bytes of the 2-bit plane, $9 of the 1-bit plane. $10 selects its half (0 or 1, in each byte). Field i of
    byte j of the lower plane belongs to bit 2 i + half of byte j % n of the upper plane, which has n bytes.
    """
    target = 5 if operand == FP16 else 4
    exponent = 0 if operand == FP16 else 0x80808080
    high = lower_byte(operand) * 0x01010101
    lines = [".reg .b32 s, t, u, v;", "and.b32 s, $10, 1;", "shr.b32 u, $9, s;"]
    for i in range(4):
        for register, word, shift, mask in (
            ("t", "$8", 2 * i - target, 3 << target),
            ("v", "u", 2 * i - target - 2, 4 << target),
        ):
            lines.append(_shift_line(register, word, shift))
            lines.append(f"and.b32 {register}, {register}, {mask * 0x01010101:#010x};")
        lines.append(f"or.b32 t, t, {exponent:#010x};")
        lines.append("or.b32 t, t, v;")
        lines.append(f"prmt.b32 ${2 * i}, t, {high:#010x}, 0x4140;")
        lines.append(f"prmt.b32 ${2 * i + 1}, t, {high:#010x}, 0x4342;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def ternary_asm(operand: int):
    """Return PTX that turns four bytes of ternary codes, in $10, into two registers of two floats for each digit.

    A byte b below 243 becomes f = ceil(256 b / 243) = b + (110 b + 2006) // 2048, a fraction of 8 bits in a lane of 16.
    Tripling it moves the most significant digit above the point and leaves the exact fraction of the other digits.
    float16 uses the digit d where it is (1 + d / 4), bfloat16 at the bottom of its mantissa (128 + d).
    """
    lines = [".reg .b32 f, t;"]
    for pair, selector in enumerate((0x4140, 0x4342)):
        lines.append(f"prmt.b32 f, $10, 0, {selector:#06x};")
        lines.append("mad.lo.u32 t, f, 110, 0x07d607d6;")
        lines.append("shr.b32 t, t, 11;")
        lines.append("and.b32 t, t, 0x000f000f;")
        lines.append("add.u32 f, f, t;")
        for i in (4, 3, 2, 1, 0):
            lines.append("mul.lo.u32 t, f, 3;")
            if operand == FP16:
                lines.append("and.b32 f, t, 0x03000300;")
                lines.append(f"or.b32 ${2 * i + pair}, f, 0x3c003c00;")
            else:
                lines.append(f"prmt.b32 ${2 * i + pair}, t, 0x43434343, 0x4341;")
            if i:
                lines.append("and.b32 f, t, 0x00ff00ff;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constraints(outputs: int, inputs: int = 1):
    """Return the constraints of an assembly. Early clobber: outputs are written before all inputs are read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def float_type(operand: int):
    """Return the dtype of an operand."""
    return {0: tl.bfloat16, 1: tl.float16, 2: tl.bfloat16, 3: tl.float32}[int(operand)]


@triton.constexpr_function
def _types(operand: int, count: int):
    """Return the dtypes of an assembly's outputs."""
    return (float_type(operand),) * count


@triton.constexpr_function
def factor(levels: int, operand: int):
    """Return the factor with which a code c reads as ``bias + c / factor``."""
    if operand == PORTABLE:
        return 1.0
    if levels == 3:
        return 4.0 if operand == FP16 else 1.0
    lowest = 16 if levels == 256 else levels  # 8 bits come as two halves
    return float(4 * lowest if operand == FP16 else lowest)


@triton.constexpr_function
def bias(levels: int, operand: int):
    """Return the bias with which a code c reads as ``bias + c / factor``."""
    if operand == PORTABLE:
        return 0.0
    if levels == 3:
        return {0: 128.0, 1: 1.0, 2: 0.0}[int(operand)]
    return 17.0 if levels == 256 else 1.0


@triton.constexpr_function
def lower_byte(operand: int):
    """Return the high byte of floats that read 1 + c / factor."""
    return 0x3C if operand == FP16 else 0x3F


@triton.constexpr_function
def upper_byte(operand: int):
    """Return the high byte of floats for the upper half of 8 bits, which read 16 + 16 c / factor."""
    return 0x4C if operand == FP16 else 0x41


@triton.jit
def plane_fields(w: Tile, BITS: tl.constexpr, OPERAND: tl.constexpr, HIGH: tl.constexpr, PORTABLE_WEIGHT: tl.constexpr):
    """Tile of bytes -> tuple of 8 / BITS tiles: field i of each byte as a float.

    Args:
        w: bytes
        HIGH: the floats' high byte
        PORTABLE_WEIGHT: factor of the field for PORTABLE operands
    """
    if OPERAND == PORTABLE:
        fields = ()
        for i in tl.static_range(8 // BITS):
            fields = fields + (((w >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.float32) * PORTABLE_WEIGHT,)  # noqa: RUF005
        return fields
    else:
        return tl.inline_asm_elementwise(
            plane_asm(BITS, OPERAND, HIGH),
            _constraints(16 // BITS),
            [w],
            dtype=_types(OPERAND, 8 // BITS),
            is_pure=True,
            pack=4,
        )


@triton.jit
def three_bit_fields(low: Tile, high: Tile, half: Tile, OPERAND: tl.constexpr):
    """Tiles of the 2-bit plane, of the matching 1-bit plane, and of its half -> tuple of 4 tiles of floats."""
    if OPERAND == PORTABLE:
        fields = ()
        bits = high >> half
        for i in tl.static_range(4):
            fields = fields + ((((low >> (2 * i)) & 3) + (((bits >> (2 * i)) & 1) << 2)).to(tl.float32),)  # noqa: RUF005
        return fields
    else:
        return tl.inline_asm_elementwise(
            three_bit_asm(OPERAND),
            _constraints(8, 3),
            [low, high, half],
            dtype=_types(OPERAND, 4),
            is_pure=True,
            pack=4,
        )


@triton.jit
def ternary_fields(w: Tile, OPERAND: tl.constexpr):
    """Tile of bytes below 243 -> tuple of 5 tiles: their base-3 digits as floats, least significant first."""
    if OPERAND == PORTABLE:
        digits = ()
        quotient = w.to(tl.int32)
        for _ in tl.static_range(5):
            digits = digits + ((quotient % 3).to(tl.float32),)  # noqa: RUF005
            quotient = quotient // 3
        return digits
    else:
        digits = tl.inline_asm_elementwise(
            ternary_asm(OPERAND), _constraints(10), [w], dtype=_types(OPERAND, 5), is_pure=True, pack=4
        )
        if OPERAND == SPLIT:  # a bias of 128 would cost float32 sums seven of their bits
            a, b, c, d, e = digits
            digits = (a - 128, b - 128, c - 128, d - 128, e - 128)
        return digits
