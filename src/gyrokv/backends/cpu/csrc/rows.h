// Rows of a block of K as they lie in memory.
#pragma once
#include "expand.h"

namespace gyrokv {
namespace GYROKV_ISA {

struct KeyRows {
    const char* rows;
    int64_t stride;    // bytes
    int bytes, count;  // of a row; rows
    char* padded;      // room for LANES rows

    struct Place {
        const char* at;
        int64_t stride;
    };
    // Where LANES rows from `first` on are: the last ones, if they are fewer or bytes `beyond` them are read, in `padded`, and then any
    // others.
    inline __attribute__((always_inline)) Place place(int first, bool beyond = false) const {
        const Place here = {rows + first * stride, stride};
        const int left = count - first;
        if (left >= LANES + beyond) return here;
        for (int i = 0; i < std::min(left, LANES); ++i) std::memcpy(padded + i * bytes, here.at + i * stride, bytes);
        return {padded, bytes};
    }
};

// Rows that are soon wanted, without gaps between them, a share of their lines at a time. Ahead has asked for them already, but a block
// of K is larger than the first cache, and where products wait for rows, those that are in the second one keep them waiting.
class Soon {
   public:
    Soon() = default;
    // Of `rows` rows from `first` on; share: bytes.
    inline __attribute__((always_inline)) Soon(const KeyRows& k, int first, int rows, int64_t share) : share_(share) {
        if (k.stride == k.bytes && first + rows <= k.count) at_ = k.rows + first * k.stride, end_ = at_ + rows * k.stride;
    }
    inline __attribute__((always_inline)) void ask() {
        const char* stop = at_ + std::min<int64_t>(share_, end_ - at_);
        for (; at_ < stop; at_ += CACHE_LINE) __builtin_prefetch(at_, 0, 3);
    }

   private:
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t share_ = 0;
};

}  // namespace GYROKV_ISA
}  // namespace gyrokv
