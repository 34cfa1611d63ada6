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
def plane_asm(levels, words, wide):
    """PTX for ``wide`` elements of each operand: codes, high and low words of activations: of the first field for each
    word of codes, then of the second ...
    """
    bits = 8 // fields_of(levels)
    mask = ((1 << bits) - 1) * 0x01010101
    lines = []
    for k in range(words):
        for f in range(fields_of(levels)):
            word = f"${wide + k}"
            if f:
                lines.append(f"shr.b32 t, {word}, {f * bits};")
                word = "t"
            if bits < 8:
                lines.append(f"and.b32 t, {word}, {mask:#010x};")
                word = "t"
            lines += _dot_lines(word, wide + words, f * words + k, wide, k == f == 0)
    return _block(lines, wide)


@triton.constexpr_function
def three_bit_asm(words, upper_words, half, wide):
    """As ``plane_asm``, with the words of the high plane and which half of their bits behind the codes.

    The high bit of field f is bit 2 f of its byte: where the field's low bits begin. So fields 0 and 2, and shifted by
    two bits 1 and 3, become two words of nibbles, two operations each.

    half: words of a group's high plane, a multiple of ``wide``
    """
    upper = wide + words
    shift = upper + upper_words
    lines = []
    for k in range(words):
        lines.append(f"shr.b32 u, ${upper + k % upper_words}, ${shift};")
        if k // half:
            lines.append("shr.b32 u, u, 1;")
        lines.append("shl.b32 e, u, 2;")
        lines.append(f"shr.b32 o, ${wide + k}, 2;")
        # the bits of the first where the mask has ones, else those of the second
        lines.append(f"lop3.b32 e, ${wide + k}, e, 0x33333333, 0xe4;")
        lines.append("lop3.b32 o, o, u, 0x33333333, 0xe4;")
        for f, word in enumerate(("e", "o", "e", "o")):
            if f > 1:
                lines.append(f"shr.b32 t, {word}, 4;")
                word = "t"
            lines.append(f"and.b32 t, {word}, 0x07070707;")
            lines += _dot_lines("t", shift + wide, f * words + k, wide, k == f == 0)
    return _block(lines, wide)


@triton.constexpr_function
def ternary_asm(wide):
    """PTX: a window of 8 words of codes, by how many bits the group starts behind it, high and low words of activations
    in the order of columns, then those that start two columns later.
    """
    shift = wide + 8
    first = shift + wide
    lines = [f"setp.ge.u32 p, ${shift}, 32;", f"and.b32 u, ${shift}, 31;"]
    for k in range(8):
        lines.append(f"selp.b32 w{k}, ${wide + min(k + 1, 7)}, ${wide + k}, p;")
    for k in range(7):
        lines.append(f"shf.r.wrap.b32 w{k}, w{k}, w{k + 1}, u;")
        if k == 6:
            lines.append("and.b32 w6, w6, 0xffff;")  # 26 bytes end here
        lines += _dot_lines(f"w{k}", first, k, wide, k == 0)
        for lane, start in (("e", f"and.b32 e, w{k}, 0x00ff00ff;"), ("o", f"prmt.b32 o, w{k}, 0, 0x4341;")):
            lines.append(start)
            # f = ceil(256 b / 243) = b + (110 b + 2006) // 2048
            lines.append(f"mad.lo.u32 t, {lane}, 110, 0x07d607d6;")
            lines.append("shr.b32 t, t, 11;")
            lines.append("and.b32 t, t, 0x000f000f;")
            lines.append(f"add.u32 {lane}, {lane}, t;")
        for i, power in enumerate((81, 27, 9, 3), start=1):
            word = ternary_word(i, k)
            if word is not None:
                lines.append(f"mul.lo.u32 s, e, {power};")
                lines.append(f"mul.lo.u32 t, o, {power};")
                lines.append("prmt.b32 t, s, t, 0x7351;")
                lines += _dot_lines("t", first, word, wide, False)
    return _block(lines, wide)


@triton.constexpr_function
def _assembly(levels, words, upper_words, half, wide):
    if levels == 3:
        return ternary_asm(wide)
    return three_bit_asm(words, upper_words, half, wide) if levels == 8 else plane_asm(levels, words, wide)


@triton.constexpr_function
def ternary_word(i, k):
    """Which word of activations the i-th digits of word k of a group's codes meet: digit i of byte b is column
    26 i + b, and words 32 and further start two columns later than the first 32. None: there is no such column.
    """
    if i == 4 and k == 6:
        return None
    return 26 * i // 4 + k + (32 if i % 2 else 0)


@triton.constexpr_function
def _dot_lines(codes, first, word, wide, begin):
    """``codes`` times activations: operands are tiles of ``wide`` high words, then of as many low ones."""
    high = first + word // wide * 2 * wide + word % wide
    h, l = ("0", "0") if begin else ("h", "l")  # noqa: E741
    return [f"dp4a.u32.s32 h, {codes}, ${high}, {h};", f"dp4a.u32.u32 l, {codes}, ${high + wide}, {l};"]


@triton.constexpr_function
def _block(lines, wide):
    registers = "e, o, s, t, u, h, l, " + ", ".join(f"w{k}" for k in range(8))
    lines = [f".reg .b32 {registers};", ".reg .pred p;", *lines, "mad.lo.s32 $0, h, 256, l;"]
    return "{\n" + "\n".join(lines + [f"mov.b32 ${i}, 0;" for i in range(1, wide)]) + "\n}"


@triton.constexpr_function
def _constraints(inputs, wide):
    return ",".join(["=&r"] * wide + ["r"] * (inputs * wide))


@triton.jit
def split(t, WIDE: tl.constexpr):
    """[A, N] -> N / WIDE tensors [A, WIDE]."""
    if t.shape[1] == WIDE:
        return (t,)
    else:
        first, second = tl.split(tl.permute(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), [0, 2, 1]))
        return split(first, WIDE) + split(second, WIDE)


@triton.jit
def _dot_bytes(codes, high, low):
    """Sum of four products of unsigned bytes of ``codes`` and activations, in plain arithmetic."""
    total = (codes & 255) * (((high << 24) >> 24) * 256 + (low & 255))
    for b in tl.static_range(1, 4):
        total += ((codes >> (8 * b)) & 255) * (((high << (24 - 8 * b)) >> 24) * 256 + ((low >> (8 * b)) & 255))
    return total


@triton.jit
def _thirds(w, i: tl.constexpr):
    """Every byte of w divided by 3^i."""
    field = w * 0
    for b in tl.static_range(4):
        field |= (((w >> (8 * b)) & 255) // (3**i)) << (8 * b)
    return field


@triton.jit
def _unsigned_shift(w, bits):
    return (w.to(tl.uint32, bitcast=True) >> bits.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _plain_planes(codes, upper, shift, high, low, LEVELS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr):
    total = codes[0] * 0
    for k in tl.static_range(len(codes)):
        for f in tl.static_range(fields_of(LEVELS)):
            if LEVELS == 8:
                half = _unsigned_shift(upper[k % len(upper)], shift + (2 * f + k * WIDE // HALF))
                field = ((codes[k] >> (2 * f)) & 0x03030303) | ((half & 0x01010101) << 2)
            elif LEVELS == 256:
                field = codes[k]
            else:
                field = (codes[k] >> (8 // fields_of(LEVELS) * f)) & ((LEVELS - 1) * 0x01010101)
            total += _dot_bytes(field, high[f * len(codes) + k], low[f * len(codes) + k])
    return total


@triton.jit
def _element(tiles, i: tl.constexpr, WIDE: tl.constexpr):
    """Element i of the last axis of tiles [..., WIDE] that follow each other: [...]."""
    return tl.sum(tl.where(tl.arange(0, WIDE) == i % WIDE, tiles[i // WIDE], 0), 2)


@triton.jit
def _plain_ternary(codes, shift, high, low, WIDE: tl.constexpr):
    start = tl.max(shift, 2)
    total = start * 0
    for k in tl.static_range(7):
        word, after, beyond = (
            _element(codes, k, WIDE),
            _element(codes, k + 1, WIDE),
            _element(codes, min(k + 2, 7), WIDE),
        )
        first, second = tl.where(start >= 32, after, word), tl.where(start >= 32, beyond, after)
        w = tl.where(start % 32 == 16, _unsigned_shift(first, start * 0 + 16) | (second << 16), first)
        if k == 6:
            w &= 0xFFFF
        for i in tl.static_range(5):
            if ternary_word(i, k) is not None:
                x_high = _element(high, ternary_word(i, k), WIDE)
                total += _dot_bytes(_thirds(w, i), x_high, _element(low, ternary_word(i, k), WIDE))
    return total


@triton.jit
def dot(
    codes, upper, shift, high, low, LEVELS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, PLAIN: tl.constexpr
):
    """Codes times activations: the sum over all columns of code * (256 high + low), int32 [L, M].

    The assembly takes the WIDE elements of a tile's last axis together. Triton does not promise which elements it
    hands over together, but does so for those that a thread's load of WIDE words has brought: see ``launch``.

    codes:     words of codes, tiles int32 [L, M, WIDE]; of ternary the window of 8 that holds the group
    upper:     of 3 bits, words of the high plane that belong to the same columns, tiles as above
    shift:     int32 [L, 1, WIDE]; of 3 bits, which half of the bits of the high plane, of HALF words, the first word
               has; of ternary, at which bit of the window the group starts
    high, low: as ``fixed.fixed_point`` gives them, tiles [L, 1, WIDE]
    """
    if PLAIN:
        if LEVELS == 3:
            return _plain_ternary(codes, shift, high, low, WIDE)
        else:
            return tl.sum(_plain_planes(codes, upper, shift, high, low, LEVELS, HALF, WIDE), 2)
    else:
        arguments = codes
        if LEVELS == 8:
            arguments = arguments + upper
        if LEVELS == 3 or LEVELS == 8:
            arguments = arguments + (shift,)  # noqa: RUF005 - Triton cannot unpack
        for i in tl.static_range(len(high)):
            arguments = arguments + (high[i], low[i])  # noqa: RUF005
        asm: tl.constexpr = _assembly(LEVELS, len(codes) * WIDE, len(upper) * WIDE, HALF, WIDE)
        constraints: tl.constexpr = _constraints(len(arguments), WIDE)
        return tl.sum(tl.inline_asm_elementwise(asm, constraints, arguments, tl.int32, is_pure=True, pack=WIDE), 2)
