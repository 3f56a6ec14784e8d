// What Python hands to the kernels (mirrored field by field in native.py), and what each instruction set provides.
//
// All strides are in bytes unless said otherwise. Shapes are [B, H, T, D]; rows of one head need not be contiguous,
// the values of a row are.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gyrokv {

enum Kind : int32_t { F32 = 0, F16 = 1, BF16 = 2, FP8_E4M3 = 3, CODES = 4 };
enum MaskType : int32_t { MASK_NONE = 0, MASK_BOOL = 1, MASK_F32 = 2, MASK_F16 = 3, MASK_BF16 = 4 };
enum ScaleType : int32_t { SCALE_NONE = 0, SCALE_F16 = 1, SCALE_F32 = 2 };

// Stored rows of K or V. A value of a CODES row is factor * scale * sum_p 256^p * table[p][code]; plane 0 is the low one.
struct Format {
    int32_t kind;
    int32_t bits;        // of a code; words of 16 bits, fields of 8, 4, 2 and 1 bits, as packing.py says
    int32_t dim;         // padded head size
    int32_t group;       // values per scale
    int32_t scale_type;
    int32_t planes;      // 1 or 2 int8 parts of a value
    float factor;
    int32_t linear;      // 1 when table[0][code] == code - 128, so that nothing needs looking up
    int8_t table[2][256];
};

// A rotation in blocks of a power of two, of 32 values at least: x becomes after * H(before * x), where H is Hadamard's matrix.
struct Turn {
    const float* before;  // [block]
    const float* after;   // [block], with the factor that makes it orthonormal
    int64_t block;
};

struct Rows {
    const char* words;
    const char* scale;
    int64_t word_strides[3];   // batch, head, row
    int64_t scale_strides[3];
};

// Positions position .. position + count - 1 in consecutive rows; runs are in order of position, without gaps.
struct Run {
    int64_t position, count;
    Rows k, v;
    const Format* k_format;
    const Format* v_format;
};

struct Attend {
    int32_t batch, q_heads, kv_heads, q_len;
    int32_t k_dim, v_dim;      // of stored rows
    int32_t q_dim, out_dim;    // of q and of outputs: zeros follow them in a stored row
    int32_t q_kind;            // F32, F16 or BF16
    int32_t terms;             // of codes, their q and weights: 2, or 1 for the fast inexact mode
    const char* q;             // [B, Hq, Tq, q_dim]
    int64_t q_strides[3];      // batch, head, token
    const Turn *q_turn, *out_turn;  // of q, and of outputs back; null: none
    char* out;                 // [B, Hq, Tq, out_dim], contiguous
    float* lse;                // [B, Hq, Tq]
    float scale, softcap;
    int32_t causal, threads;
    int32_t out_kind;          // F32 or BF16
    int32_t n_runs;
    const Run* runs;
    int64_t window;            // 0: none
    int64_t q_first, kv_first, kv_stop;  // positions of the first query, of the first key held and after the last
    const char* mask;          // [B, Hq, Tq, Tkv]
    int64_t mask_strides[4];   // elements; 0 where the mask is broadcast
    const float* slopes;       // [Hq] or null
    const float* sinks;        // [Hq] or null
    const int64_t* starts;     // [B] or null
    const uint8_t* map;        // block map states or null: 0 = nothing visible, 1 = all visible and unbiased
    int64_t map_strides[4];    // elements
    int32_t map_rows, map_keys, mask_type;
};

// Rows to encode. Rotation, scale rule and table are those of the format's row (formats.py); x is already scaled and
// turned by a caller's matrix, if there is one.
struct Encode {
    int32_t batch, heads, tokens, dim;   // dim: of x; padded to `padded` with zeros
    int32_t x_kind;                      // F32, F16 or BF16
    int32_t padded, group, span;         // span: values per scale
    int32_t bits, sign_magnitude;        // coding
    int32_t rule;                        // enum Rule
    int32_t corrected, ties, scale_type; // ties: 0 up, 1 down, 2 away from zero
    int32_t linear;                      // levels are the integers low .. -low - 1
    int32_t rotate;                      // 1: y = after * (H(before * x) * rotation_factor)
    int32_t threads;
    float rotation_factor, unscaled_factor;
    float scale_factor, low, high;
    const float* before;                 // [group] signs
    const float* after;                  // [group] signs
    const float* levels;                 // [2^bits] ascending
    const float* boundaries;             // [2^bits - 1] ascending
    const char* x;
    int64_t x_strides[3];
    char* words;
    int64_t word_strides[3];
    char* scale;
    int64_t scale_strides[3];
};
enum Rule : int32_t { RULE_ABSMAX = 0, RULE_SIGNED_ABSMAX = 1, RULE_L2 = 2, RULE_RMS = 3, RULE_FLOAT8 = 4 };

// One unit of work: some query rows of one KV head over a range of positions.
struct Unit {
    int32_t batch, kv_head;
    int32_t row_first, rows;       // rows are (query token, head of the group), token-major
    int64_t first, stop;           // positions
    float* out;                    // [rows, v_dim]: sum of weights * values over exp(score - top), not normalised
    float* top;                    // [rows]
    float* total;                  // [rows]
    bool alone;                    // no other unit has the same rows
    int64_t next_first;            // where the thread's next unit begins, of next_batch and next_head; -1: none is known
    int32_t next_batch, next_head;
};

// What one instruction set provides. `scratch` is 64-byte aligned and belongs to the calling thread.
struct Kernels {
    const char* name;
    size_t (*attend_scratch)(const Attend&, int rows);
    bool (*attend)(const Attend&, const Unit&, char* scratch);  // true when the rows are finished too
    void (*finish)(const Attend&, const Unit&, const float* data, int64_t stride, int64_t splits);
    size_t (*encode_scratch)(const Encode&);
    void (*encode)(const Encode&, int64_t row_first, int64_t rows, char* scratch);  // rows: of [B, H, T], flattened
};

}  // namespace gyrokv
