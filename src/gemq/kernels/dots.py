"""Words of packed codes times words of fixed-point activations, as exact integers (Triton device functions).

An activation is a 16-bit integer, 256 * high + low, with a signed high and an unsigned low byte; four columns' high
bytes make a word, their low bytes another. A word of codes holds fields of four columns each; a field is moved to the
bottom of its bytes and multiplied by instructions that add up four products of bytes (dp4a): about one instruction a
code, and no number is converted.

Ternary bytes are never taken apart. With q_i = floor(byte / 3^i) the digit is q_i - 3 q_(i+1), so that the sum of
digit_i x_i is the sum of q_i (x_i - 3 x_(i-1)): activations are combined once instead (``fixed``), and q_i are high
bytes of 81 f, 27 f, 9 f, 3 f for f = ceil(256 byte / 243).

The assembly is NVIDIA's. PLAIN does the same in ordinary arithmetic, for the interpreter and other GPUs.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def fields_of(levels):
    """Columns that share a byte of codes: so many words of activations meet a word of codes."""
    return {2: 8, 3: 5, 4: 4, 8: 4, 16: 2, 256: 1}[int(levels)]


@triton.constexpr_function
def plane_asm(bits):
    """PTX: $1 codes, then high and low words for each field."""
    mask = ((1 << bits) - 1) * 0x01010101
    lines = []
    for i in range(8 // bits):
        word = "$1"
        if i:
            lines.append(f"shr.b32 t, $1, {i * bits};")
            word = "t"
        if bits < 8:
            lines.append(f"and.b32 t, {word}, {mask:#010x};")
            word = "t"
        lines += _dot_lines(word, i)
    return _block(lines)


@triton.constexpr_function
def three_bit_asm():
    """PTX: $1 low plane, $2 the word of the high plane, $3 which half of its bits, then high and low words."""
    lines = ["shr.b32 u, $2, $3;"]
    for i in range(4):
        lines.append(f"shr.b32 t, $1, {2 * i};")
        lines.append("and.b32 t, t, 0x03030303;")
        lines.append(f"{'shl' if i == 0 else 'shr'}.b32 s, u, {abs(2 * i - 2)};")
        lines.append("and.b32 s, s, 0x04040404;")
        lines.append("or.b32 t, t, s;")
        lines += _dot_lines("t", i, first=4)
    return _block(lines)


@triton.constexpr_function
def ternary_asm():
    """PTX: $1 codes, then high and low words for q_0 ... q_4."""
    lines = _dot_lines("$1", 0)
    for lane, start in (("e", "and.b32 e, $1, 0x00ff00ff;"), ("o", "prmt.b32 o, $1, 0, 0x4341;")):
        lines.append(start)
        # f = ceil(256 b / 243) = b + (110 b + 2006) // 2048
        lines.append(f"mad.lo.u32 t, {lane}, 110, 0x07d607d6;")
        lines.append("shr.b32 t, t, 11;")
        lines.append("and.b32 t, t, 0x000f000f;")
        lines.append(f"add.u32 {lane}, {lane}, t;")
    for i, power in enumerate((81, 27, 9, 3), start=1):
        lines.append(f"mul.lo.u32 s, e, {power};")
        lines.append(f"mul.lo.u32 t, o, {power};")
        lines.append("prmt.b32 t, s, t, 0x7351;")
        lines += _dot_lines("t", i)
    return _block(lines)


@triton.constexpr_function
def _dot_lines(word, i, first=2):
    high, low = ("h", "l") if i else ("0", "0")
    return [
        f"dp4a.u32.s32 h, {word}, ${first + 2 * i}, {high};",
        f"dp4a.u32.u32 l, {word}, ${first + 2 * i + 1}, {low};",
    ]


@triton.constexpr_function
def _block(lines):
    return "{\n.reg .b32 e, o, s, t, u, h, l;\n" + "\n".join(lines) + "\nmad.lo.s32 $0, h, 256, l;\n}"


@triton.constexpr_function
def _constraints(inputs):
    return ",".join(["=r"] + ["r"] * inputs)


@triton.jit
def _dot_bytes(codes, word, SIGNED: tl.constexpr):
    """Sum of four products of unsigned bytes of ``codes`` and bytes of ``word``, in plain arithmetic."""
    total = (codes & 255) * 0
    for b in tl.static_range(4):
        byte = (word >> (8 * b)) & 255
        if SIGNED:
            byte = (byte ^ 128) - 128
        total += ((codes >> (8 * b)) & 255) * byte
    return total


@triton.jit
def _plain_field(w, high, half, i: tl.constexpr, LEVELS: tl.constexpr):
    """Field i of every byte of w as bytes; of ternary, q_i."""
    if LEVELS == 3:
        field = w * 0
        for b in tl.static_range(4):
            field |= (((w >> (8 * b)) & 255) // (3**i)) << (8 * b)
        return field
    elif LEVELS == 8:
        return ((w >> (2 * i)) & 0x03030303) | (((high >> (2 * i + half)) & 0x01010101) << 2)
    elif LEVELS == 256:
        return w
    else:
        BITS: tl.constexpr = {2: 1, 4: 2, 16: 4}[LEVELS]
        return (w >> (BITS * i)) & ((LEVELS - 1) * 0x01010101)


@triton.jit
def dot(w, high, half, words, LEVELS: tl.constexpr, PLAIN: tl.constexpr):
    """Codes times activations, int32 in w's shape: the sum over a word's columns of code * (256 high + low).

    w:          words of codes, int32; of 3 bits, of the low plane
    high, half: of 3 bits, the word of the high plane that belongs to w, and which half of its bits; else w again
    words:      for each field, the word of high bytes above that of low ones, int64
    """
    pairs = words
    words = ()
    for i in tl.static_range(fields_of(LEVELS)):
        words = words + ((pairs[i] >> 32).to(tl.int32), pairs[i].to(tl.int32))  # noqa: RUF005 - Triton cannot unpack
    if PLAIN:
        total = w * 0
        for i in tl.static_range(fields_of(LEVELS)):
            field = _plain_field(w, high, half, i, LEVELS)
            total += 256 * _dot_bytes(field, words[2 * i], True) + _dot_bytes(field, words[2 * i + 1], False)
        return total
    elif LEVELS == 8:
        arguments = (w, high, half) + words  # noqa: RUF005
        return tl.inline_asm_elementwise(three_bit_asm(), _constraints(11), arguments, tl.int32, is_pure=True, pack=1)
    else:
        asm: tl.constexpr = ternary_asm() if LEVELS == 3 else plane_asm(8 // fields_of(LEVELS))
        arguments = (w,) + words  # noqa: RUF005
        return tl.inline_asm_elementwise(
            asm, _constraints(1 + 2 * fields_of(LEVELS)), arguments, tl.int32, is_pure=True, pack=1
        )
