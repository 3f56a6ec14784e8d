// Rotate, quantise and pack new tokens: a SIMD-group per row (one head of one token). The bits are those of the
// definition (quant.py): one rounding per operation, sums in index order, square roots and quotients correctly rounded.
#pragma METAL fp contract(off)

enum Rule { ABSMAX, SIGNED_ABSMAX, L2, RMS, STATIC };
enum Ties { UP, DOWN, AWAY };

// float32, at most 448 in magnitude, to e4m3, nearest even.
METAL_FUNC uint float8_of(float x) {
  const uint bits = as_type<uint>(x), rest = bits & 0x7FFFFFFF;
  const float small = as_type<float>(rest) * 512.0f + 8388608.0f;  // subnormals are multiples of 2**-9
  const uint rounded = (rest + 0x7FFFF + (rest >> 20 & 1)) >> 20;
  return (bits >> 24 & 0x80) | (rest < 0x3C800000 ? as_type<uint>(small) - 0x4B000000 : rounded - 960);
}

// Stores the field of W bits of all codes of a row; code_at in common.h is the reverse.
template <int W, int START, int LOW, int DIM, typename Words>
METAL_FUNC void pack_field(threadgroup const ushort* codes, Words words, uint lane) {
  constexpr uint n = DIM * W / 16;
  for (uint i = lane; i < n; i += 32) {
    uint word = 0;
    for (uint p = 0; p < 16 / W; ++p) word |= (uint(codes[i + p * n]) >> LOW & ((1u << W) - 1)) << (W * p);
    words[START + i] = ushort(word);
  }
}

// The sum of N values of threadgroup memory in index order; every lane gets it.
template <int N>
METAL_FUNC float sum_in_order(threadgroup const float* values) {
  float sum = values[0];
  for (int i = 1; i < N; ++i) sum = sum + values[i];
  return sum;
}

// x [B, H, T, DIM] to words, scale from the given slot on. signs [2, GROUP]: before and after H. levels, boundaries:
// ascending, float32. A STATIC row is one group, up to the next 32. Threadgroup memory: scratch [NSG, GROUP],
// codes [NSG, PADDED].
template <int NSG, int DIM, int PADDED, int GROUP, int SPAN, int BITS, int RULE, int TIES, int ROTATED, int LINEAR_ROW,
          int SIGN_MAGNITUDE, int CORRECTED, int HALF_SCALE, typename X, typename Levels, typename Words, typename Scale>
METAL_FUNC void encode(X x, Levels signs, Levels levels, Levels boundaries, Words words, Scale scale, thread const Call& c,
                       threadgroup float* scratch, threadgroup ushort* codes, uint3 group, uint simdgroup, uint lane) {
  constexpr int OWN = GROUP / 32, SPANS = GROUP / SPAN;
  constexpr float TINY = 1e-10f;
  const long token = long(group.x) * NSG + simdgroup;
  if (token >= c.tokens) return;
  scratch += simdgroup * GROUP;
  codes += simdgroup * PADDED;
  x += group.z * c.x_b + group.y * c.x_h + token * c.x_t;
  words += group.z * c.w_b + group.y * c.w_h + token * c.w_t;
  scale += group.z * c.s_b + group.y * c.s_h + token * c.s_t;

  for (int g = 0; g < (PADDED + GROUP - 1) / GROUP; ++g) {
    float y[OWN], norm[SPANS], z[OWN];
    UNROLL for (int j = 0; j < OWN; ++j) {
      const int d = g * GROUP + int(lane) + 32 * j;
      y[j] = d < DIM ? float(x[d]) : 0.0f;
    }
    if (RULE == L2) {
      UNROLL for (int j = 0; j < OWN; ++j) scratch[lane + 32 * j] = y[j] * y[j];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      norm[0] = precise::sqrt(sum_in_order<GROUP>(scratch));
      simdgroup_barrier(mem_flags::mem_threadgroup);
      const float inverse = norm[0] > TINY ? 1.0f / norm[0] : 0.0f;
      UNROLL for (int j = 0; j < OWN; ++j) y[j] = y[j] * inverse;
    }
    if (ROTATED) {
      UNROLL for (int j = 0; j < OWN; ++j) y[j] = y[j] * signs[lane + 32 * j];
      for (ushort h = 1; h < 32; h *= 2)
        UNROLL for (int j = 0; j < OWN; ++j) {
          const float other = simd_shuffle_xor(y[j], h);
          y[j] = lane & h ? other - y[j] : y[j] + other;
        }
      UNROLL for (int h = 1; h < OWN; h *= 2)
        UNROLL for (int j = 0; j < OWN; ++j)
          if (!(j & h)) {
            const float a = y[j], b = y[j + h];
            y[j] = a + b;
            y[j + h] = a - b;
          }
      UNROLL for (int j = 0; j < OWN; ++j) {
        const float turned = y[j] * c.rotation_factor;
        y[j] = turned * signs[GROUP + lane + 32 * j];
      }
    } else if (RULE == L2) {
      UNROLL for (int j = 0; j < OWN; ++j) y[j] = y[j] * c.unscaled_factor;
    }

    // the scale of each span, and the values relative to it
    if (RULE != L2 && RULE != STATIC) {
      UNROLL for (int j = 0; j < OWN; ++j) scratch[lane + 32 * j] = RULE == RMS ? y[j] * y[j] : y[j];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL for (int s = 0; s < SPANS; ++s) {
        if (RULE == RMS) {
          const float sum = sum_in_order<SPAN>(scratch + s * SPAN);
          norm[s] = precise::sqrt(SPANS == 1 ? sum : sum / float(SPAN));
        } else {
          float extreme = scratch[s * SPAN];
          for (int i = 1; i < SPAN; ++i) {
            const float other = scratch[s * SPAN + i];
            extreme = abs(other) > abs(extreme) ? other : extreme;
          }
          norm[s] = RULE == ABSMAX ? abs(extreme) / c.high : extreme / c.low;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    UNROLL for (int j = 0; j < OWN; ++j) {
      const float n = RULE == STATIC ? 0.0f : norm[32 * j / SPAN];
      if (RULE == ABSMAX) {
        const float inverse = 1.0f / n;
        z[j] = y[j] * (isfinite(inverse) ? inverse : 0.0f);
      } else if (RULE == SIGNED_ABSMAX) {
        z[j] = n != 0.0f ? y[j] / n : 0.0f;
      } else if (RULE == RMS && SPANS == 1) {
        const float inverse = 1.0f / n, unit = y[j] * inverse;
        z[j] = n > TINY ? unit * c.root : 0.0f;
      } else if (RULE == RMS) {
        const float unit = y[j] / n;
        z[j] = n > TINY ? unit * c.scale_factor : 0.0f;
      } else {
        z[j] = y[j];
      }
    }

    // codes
    UNROLL for (int j = 0; j < OWN; ++j) {
      uint code = 0;
      if (RULE == STATIC) {
        code = float8_of(clamp(z[j], -448.0f, 448.0f));
      } else if (LINEAR_ROW && TIES == UP) {
        const float shifted = z[j] + (0.5f - c.low);
        code = uint(clamp(floor(shifted), 0.0f, c.high - c.low));
      } else if (LINEAR_ROW) {
        const float whole = trunc(z[j]), off = z[j] - whole;
        const float away = abs(off) >= 0.5f ? (z[j] > 0.0f ? whole + 1.0f : whole - 1.0f) : whole;
        code = uint(clamp(away, -c.high, c.high) - c.low);
      } else {  // how many boundaries lie below; NaN is above all
        for (uint step = 1u << (BITS - 1); step; step /= 2) {
          const float b = boundaries[code + step - 1];
          code += (TIES == UP ? b > z[j] : b >= z[j]) ? 0 : step;
        }
      }
      uint stored = code;
      if (SIGN_MAGNITUDE) {
        constexpr uint half_way = 1u << (BITS - 1);
        stored = code >= half_way ? code - half_way : 2 * half_way - 1 - code;
      }
      const int d = g * GROUP + int(lane) + 32 * j;
      if (d < PADDED) codes[d] = ushort(stored);
      if (CORRECTED) scratch[lane + 32 * j] = levels[code] * levels[code];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (CORRECTED)
      UNROLL for (int s = 0; s < SPANS; ++s) {
        const float length = precise::sqrt(sum_in_order<SPAN>(scratch + s * SPAN));
        norm[s] = length > TINY ? norm[s] / length : norm[s];
      }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (RULE != STATIC && lane == 0)
      UNROLL for (int s = 0; s < SPANS; ++s) {
        float n = norm[s];
        if (HALF_SCALE) n = isnan(n) ? 65504.0f : clamp(n, -65504.0f, 65504.0f);
        scale[g * SPANS + s] = n;
      }
  }
  if (BITS & 8) pack_field<8, 0, 0, PADDED>(codes, words, lane);
  if (BITS & 4) pack_field<4, (BITS & 8) * PADDED / 16, BITS & 8, PADDED>(codes, words, lane);
  if (BITS & 2) pack_field<2, (BITS & 12) * PADDED / 16, BITS & 12, PADDED>(codes, words, lane);
  if (BITS & 1) pack_field<1, (BITS & 14) * PADDED / 16, BITS & 14, PADDED>(codes, words, lane);
}
