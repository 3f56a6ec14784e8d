// q of few rows as rows of K side by side want it (see quads.h).
#pragma once
#include "quads.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

struct QuadQuery {};

#else

// q of the rows of a pass: dwords [line][dword of a part][row][term], then per run of parts with the same scales [set of dwords][row] what
// sums begin with and the scales of q.
struct QuadQuery {
    const char *parts, *begin, *scale;
    int rows;
};
INLINE int64_t quad_query_bytes(int dim, int rows) { return rows * (round_up(int64_t(dim), 64) / 16 * 2) * 5 * PART_BYTES; }

// 16 values of q from their two terms, as words will hold them.
INLINE __m512i join_terms(__m128i high, __m128i low) {
    return _mm512_add_epi32(_mm512_slli_epi32(_mm512_cvtepi8_epi32(high), 8), _mm512_cvtepi8_epi32(low));
}

// What words of q whose sizes add up to `size` are multiplied with, so that their products with large words of K fit an integer.
INLINE vf shrink_words(const Format& f, int64_t size) {
    return splat(f.planes == 2 && size > WORD_SUM ? float(WORD_SUM) / float(size) : 1.0f);
}

// q as words: of each dword of codes those that the even bytes meet, then those that the odd ones do. Where large words of K meet
// them, those of a run of parts are made smaller if their sizes add up to more than WORD_SUM.
inline QuadQuery pack_words(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, const float* scale,
                            float factor, char* to) {
    char *start = to + 4 * 4 * order.parts * order.lines * rows * 2, *scales = start + 4 * 4 * order.parts * rows;
    const QuadQuery made = {to, start, scales, rows};
    for (int begin = 0, p = 0; begin < order.parts; begin = p) {
        while (!order.part[p++].last) {
        }
        float larger[QUAD_ROWS];
        int32_t zero[4][QUAD_ROWS] = {};  // [set]: what ZERO adds
        for (int r = 0; r < rows; ++r) {
            int64_t size = 0;
            for (int pass = 0; pass < 2; ++pass) {
                char* at = to + 8 * r;
                const vf smaller = shrink_words(f, size);
                larger[r] = 1.0f / smaller[0];
                for (int i = begin * order.lines; i < p * order.lines; ++i, at += 4 * 8 * rows) {
                    auto term = [&](int number) {
                        const char* from = a + (int64_t(r) * 2 + number) * stride + order.first(i / order.lines, i % order.lines);
                        const __m128i even = _mm_loadl_epi64((const __m128i*)from);
                        const __m128i odd = _mm_loadl_epi64((const __m128i*)(from + f.dim / 2));
                        return _mm_unpacklo_epi8(even, odd);
                    };
                    const __m512i whole = join_terms(term(0), term(1));
                    if (!pass) {
                        size += _mm512_reduce_add_epi32(_mm512_abs_epi32(whole));
                        for (int set = 0; f.linear && f.bits == 8 && set < order.sets; ++set)
                            zero[set][r] -= ZERO * _mm512_mask_reduce_add_epi32(order.sets == 1 ? 0xffff : 0x5555 << set, whole);
                        continue;
                    }
                    alignas(32) int16_t words[LANES];
                    _mm256_store_si256((__m256i*)words, _mm512_cvtepi32_epi16((__m512i)round_int(to_float((vi)whole) * smaller)));
                    for (int d = 0; d < 4; ++d) {
                        const int16_t four[4] = {words[4 * d], words[4 * d + 2], words[4 * d + 1], words[4 * d + 3]};
                        std::memcpy(at + d * 8 * rows, four, 8);
                    }
                }
            }
        }
        to += 4 * 8 * rows * (p - begin) * order.lines;
        for (int set = 0; set < order.sets; ++set)
            for (int r = 0; r < rows; ++r, scales += 4, start += 4) {
                const float x = scale[r * (f.dim / f.group) + order.part[begin].group[set]] * larger[r] * factor;
                std::memcpy(scales, &x, 4), std::memcpy(start, &zero[set][r], 4);
            }
    }
    return made;
}

// The same group by group (see GroupKeys).
inline QuadQuery pack_groups(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, int terms, const float* scale,
                             float word_factor, char* to) {
    const GroupKeys& keys = order.keys;
    const int sums = order.words ? 1 : terms, values = order.words ? 2 : 4;
    char *begin = to + 4 * f.dim / values * rows * sums, *scales = begin + 4 * keys.runs * rows * sums;
    const QuadQuery made = {to, begin, scales, rows};
    for (int i = 0; i < keys.runs; ++i) {
        const GroupKeys::Run& run = keys.run[i];
        for (int r = 0; r < rows; ++r, begin += 4 * sums, scales += 4) {
            auto term = [&](int number, int v) {
                return _mm_loadu_si128((const __m128i*)(a + (int64_t(r) * terms + number) * stride + run.first + v));
            };
            float factor = scale[r * (f.dim / f.group) + run.group];
            if (order.words) {
                int64_t size = 0;
                for (int v = 0; v < run.count; v += LANES)
                    size += _mm512_reduce_add_epi32(_mm512_abs_epi32(join_terms(term(0, v), term(1, v))));
                const vf smaller = shrink_words(f, size);
                factor *= word_factor / smaller[0];
                for (int v = 0; v < run.count; v += LANES) {
                    alignas(32) char words[2 * LANES];
                    const vi made = round_int(to_float((vi)join_terms(term(0, v), term(1, v))) * smaller);
                    _mm256_store_si256((__m256i*)words, _mm512_cvtepi32_epi16((__m512i)made));
                    for (int d = 0; d < LANES / 2; ++d) std::memcpy(to + 4 * ((v / 2 + d) * rows + r), words + 4 * d, 4);
                }
            } else {
                int32_t all[2] = {};  // [term]
                for (int number = 0; number < terms; ++number)
                    for (int v = 0; v < run.count; v += LANES) {
                        alignas(16) char bytes[LANES];
                        _mm_store_si128((__m128i*)bytes, term(number, v));
                        all[number] += _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(term(number, v)));
                        for (int d = 0; d < LANES / 4; ++d)
                            std::memcpy(to + 4 * (((v / 4 + d) * rows + r) * terms + number), bytes + 4 * d, 4);
                    }
                const int32_t start[2] = {terms == 1 ? -ZERO * all[0] : 0, -ZERO * (256 * all[0] + all[1])};  // what ZERO adds
                std::memcpy(begin, start, 4 * sums);
            }
            std::memcpy(scales, &factor, 4);
        }
        to += 4 * run.dwords * rows * sums;
    }
    return made;
}

// q of the rows of a pass, of which a [row][term] is int8 and `stride` bytes apart and scale [row][group] its scales.
inline QuadQuery pack_quads(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, int terms, const float* scale,
                            float word_factor, char* to) {
    if (order.by_group) return pack_groups(f, order, a, stride, rows, terms, scale, word_factor, to);
    if (order.words_for(rows)) return pack_words(f, order, a, stride, rows, scale, word_factor, to);
    const int dwords = 4 * order.parts * order.lines, sums = f.planes == 2 ? 2 : terms, sets = order.sets;
    char *begin = to + 4 * dwords * rows * terms, *scales = begin + 4 * dwords * rows * sums;
    const QuadQuery made = {to, begin, scales, rows};
    const bool sorts = !order.plain || sets > 1;
    const __m128i ones = _mm_set1_epi8(1);
    __m128i sum[2][QUAD_ROWS][2] = {};  // [code, if it has scales of its own][row][term]: of the bytes of each dword of a part
    for (int p = 0; p < order.parts; ++p) {
        const Part& part = order.part[p];
        for (int s = 0; s < order.lines; ++s, to += 4 * rows * terms * 4)
            for (int r = 0; r < rows; ++r)
                for (int term = 0; term < terms; ++term) {
                    const char* from = a + (int64_t(r) * terms + term) * stride + order.first(p, s);
                    const __m128i even = _mm_loadl_epi64((const __m128i*)from);
                    const __m128i odd = _mm_loadl_epi64((const __m128i*)(from + f.dim / 2));
                    const __m128i x = sorts ? _mm_unpacklo_epi64(even, odd) : _mm_unpacklo_epi8(even, odd);
                    __m128i& own = sum[sets == 4 ? s : 0][r][term];
                    own = _mm_dpbusd_epi32(own, ones, x);
                    alignas(16) int32_t dword[4];
                    _mm_store_si128((__m128i*)dword, x);
                    for (int d = 0; d < 4; ++d) std::memcpy(to + 4 * ((d * rows + r) * terms + term), dword + d, 4);
                }
        if (!part.last) continue;
        for (int set = 0; set < sets; ++set)
            for (int r = 0; r < rows; ++r) {
                int32_t all[2] = {};  // [term]
                for (int term = 0; term < terms; ++term) {
                    alignas(16) int32_t of[4];
                    _mm_store_si128((__m128i*)of, sum[set / 2][r][term]);
                    const int side = set % 2;
                    all[term] = sets > 1 ? of[2 * side] + of[2 * side + 1] : of[0] + of[1] + of[2] + of[3];
                }
                const int32_t high = f.planes == 2 || terms == 1 ? all[0] : 0, low = (f.planes == 2 ? 1 : 256) * all[0] + all[1];
                for (int i = 0; i < sums; ++i, begin += 4) {
                    const int32_t x = -ZERO * (i ? low : high);  // what ZERO adds
                    std::memcpy(begin, &x, 4);
                }
                const float x = scale[int64_t(r) * (f.dim / f.group) + part.group[set]] * (f.planes == 2 ? 256.0f : 1.0f);
                std::memcpy(scales, &x, 4), scales += 4;
            }
        std::fill_n(&sum[0][0][0], 4 * QUAD_ROWS, __m128i{});
    }
    return made;
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
