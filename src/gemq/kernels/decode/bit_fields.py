"""Packed bytes -> operands of the tensor cores, in registers (Triton device functions).

No number is converted. A field of a byte is moved to the top of the low byte's share of a mantissa and the
high byte is a constant, so that the 16-bit float reads ``bias + code / factor``: about one instruction a
code. A product with x then exceeds the wanted one by bias times the sum of x, which offsets need anyway.
bfloat16 has 7 mantissa bits in its low byte (the byte's top bit is the last of the exponent), float16 has 8
there and 2 above. Ternary digits come out at a fixed place instead.

The inline assembly is NVIDIA's. PLAIN does the same in ordinary arithmetic, for the interpreter and other GPUs.
(Tuples are added up because Triton cannot unpack them.)
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

BF16, FP16, SPLIT, PLAIN = (tl.constexpr(kind) for kind in range(4))
"""What the tensor cores get: bfloat16, float16, float32 as three parts of bfloat16, float32 without them."""


@triton.constexpr_function
def plane_asm(bits, kind, high):
    """PTX for four bytes in the last operand: for each of the 8 / bits fields, two registers of two floats.

    high: the floats' high byte
    """
    fields = 8 // bits
    target = 8 - bits if kind == FP16 else 7 - bits  # lowest bit of the field in the float's low byte
    exponent = 0 if kind == FP16 else 0x80808080  # the exponent's last bit
    mask = (((1 << bits) - 1) << target) * 0x01010101
    lines = [".reg .b32 t;"]
    for i in range(fields):
        shift = i * bits - target
        lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, ${2 * fields}, {abs(shift)};")
        lines.append(f"and.b32 t, t, {mask:#010x};")
        lines.append(f"or.b32 t, t, {exponent:#010x};")
        lines.append(f"prmt.b32 ${2 * i}, t, {high * 0x01010101:#010x}, 0x4140;")
        lines.append(f"prmt.b32 ${2 * i + 1}, t, {high * 0x01010101:#010x}, 0x4342;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def three_bit_asm(kind):
    """PTX: four bytes of the 2-bit plane in $8, of the 1-bit plane in $9; $10 says which half of it, in each byte.

    Field i of byte j of the lower plane belongs to bit 2 i + half of byte j % n of the upper one.
    """
    target = 5 if kind == FP16 else 4
    exponent = 0 if kind == FP16 else 0x80808080
    high = lower_byte(kind) * 0x01010101
    lines = [".reg .b32 s, t, u, v;", "and.b32 s, $10, 1;", "shr.b32 u, $9, s;"]
    for i in range(4):
        for into, word, shift, mask in (
            ("t", "$8", 2 * i - target, 3 << target),
            ("v", "u", 2 * i - target - 2, 4 << target),
        ):
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 {into}, {word}, {abs(shift)};")
            lines.append(f"and.b32 {into}, {into}, {mask * 0x01010101:#010x};")
        lines.append(f"or.b32 t, t, {exponent:#010x};")
        lines.append("or.b32 t, t, v;")
        lines.append(f"prmt.b32 ${2 * i}, t, {high:#010x}, 0x4140;")
        lines.append(f"prmt.b32 ${2 * i + 1}, t, {high:#010x}, 0x4342;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def ternary_asm(kind):
    """PTX for four bytes in $10: five digits, two registers of two floats each.

    A byte b below 243 becomes f = ceil(256 b / 243) = b + (110 b + 2006) // 2048, 8 bits of fraction in a lane of 16.
    Tripling moves the most significant digit above the point and leaves the exact fraction of the others.
    float16 takes the digit where it is (1 + d / 4), bfloat16 at the bottom of its mantissa (128 + d).
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
            if kind == FP16:
                lines.append("and.b32 f, t, 0x03000300;")
                lines.append(f"or.b32 ${2 * i + pair}, f, 0x3c003c00;")
            else:
                lines.append(f"prmt.b32 ${2 * i + pair}, t, 0x43434343, 0x4341;")
            if i:
                lines.append("and.b32 f, t, 0x00ff00ff;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constraints(outputs, inputs=1):
    # Early clobber: outputs are written before the inputs are read for the last time.
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def float_type(kind):
    return {0: tl.bfloat16, 1: tl.float16, 2: tl.bfloat16, 3: tl.float32}[int(kind)]


@triton.constexpr_function
def _types(kind, count):
    return (float_type(kind),) * count


@triton.constexpr_function
def factor(levels, kind):
    """A code c reads as ``bias + c / factor``."""
    if kind == PLAIN:
        return 1.0
    if levels == 3:
        return 4.0 if kind == FP16 else 1.0
    lowest = 16 if levels == 256 else levels  # 8 bits come as two halves
    return float(4 * lowest if kind == FP16 else lowest)


@triton.constexpr_function
def bias(levels, kind):
    if kind == PLAIN:
        return 0.0
    if levels == 3:
        return {0: 128.0, 1: 1.0, 2: 0.0}[int(kind)]
    return 17.0 if levels == 256 else 1.0


@triton.constexpr_function
def lower_byte(kind):
    """High byte of the floats: 1 + c / factor."""
    return 0x3C if kind == FP16 else 0x3F


@triton.constexpr_function
def upper_byte(kind):
    """High byte of the floats of the upper half of 8 bits: 16 + 16 c / factor."""
    return 0x4C if kind == FP16 else 0x41


@triton.jit
def plane_fields(w, BITS: tl.constexpr, KIND: tl.constexpr, HIGH: tl.constexpr, WEIGHT: tl.constexpr):
    """Tile of bytes -> tuple of 8 / BITS tiles: field i of each byte as a float. WEIGHT: of the field, if PLAIN."""
    if KIND == PLAIN:
        fields = ()
        for i in tl.static_range(8 // BITS):
            fields = fields + (((w >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.float32) * WEIGHT,)  # noqa: RUF005
        return fields
    else:
        return tl.inline_asm_elementwise(
            plane_asm(BITS, KIND, HIGH),
            _constraints(16 // BITS),
            [w],
            dtype=_types(KIND, 8 // BITS),
            is_pure=True,
            pack=4,
        )


@triton.jit
def three_bit_fields(low, high, half, KIND: tl.constexpr):
    """Tiles of the 2-bit plane, of the 1-bit plane as it belongs to it, and of its halves -> tuple of 4 tiles."""
    if KIND == PLAIN:
        fields = ()
        bits = high >> half
        for i in tl.static_range(4):
            fields = fields + ((((low >> (2 * i)) & 3) + (((bits >> (2 * i)) & 1) << 2)).to(tl.float32),)  # noqa: RUF005
        return fields
    else:
        return tl.inline_asm_elementwise(
            three_bit_asm(KIND), _constraints(8, 3), [low, high, half], dtype=_types(KIND, 4), is_pure=True, pack=4
        )


@triton.jit
def ternary_fields(w, KIND: tl.constexpr):
    """Tile of bytes below 243 -> tuple of 5 tiles: their base-3 digits, least significant first."""
    if KIND == PLAIN:
        digits = ()
        rest = w.to(tl.int32)
        for _ in tl.static_range(5):
            digits = digits + ((rest % 3).to(tl.float32),)  # noqa: RUF005
            rest = rest // 3
        return digits
    else:
        digits = tl.inline_asm_elementwise(
            ternary_asm(KIND), _constraints(10), [w], dtype=_types(KIND, 5), is_pure=True, pack=4
        )
        if KIND == SPLIT:  # 128 times a sum would cost float32 seven of its bits
            a, b, c, d, e = digits
            digits = (a - 128, b - 128, c - 128, d - 128, e - 128)
        return digits
