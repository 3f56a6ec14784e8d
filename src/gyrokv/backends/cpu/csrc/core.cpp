// The library's C interface: which instruction sets run here, how attention is cut into units of work, and how the
// units' results become outputs. Compiled for the baseline of the architecture; kernels.cpp once per instruction set.
#include "core.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "level.h"
#include "threads.h"

// The build defines GYROKV_LEVELS as X(name) of each instruction set it compiled, best first.
#define X(isa) extern "C" const gyrokv::Kernels gyrokv_kernels_##isa;
GYROKV_LEVELS
#undef X

namespace gyrokv {
namespace {

#define X(isa) &gyrokv_kernels_##isa,
const Kernels* const kLevels[] = {GYROKV_LEVELS};
#undef X
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]);

constexpr int64_t kMostRows = 2048;      // query rows of a unit, which share panels
constexpr int64_t kRows = 512;           // the same where units would be fewer than threads need
constexpr int64_t kRowStep = 16;         // row blocks are multiples of this, the height of a matrix tile
constexpr int64_t kKeyStep = 64;         // splits lie at multiples of this from the first key held, as block maps do
constexpr int64_t kLeastKeys = 512;      // of a split: fewer cost more in merging than they win
constexpr int64_t kUnitsPerThread = 4;   // at least, so that no thread waits long for the last unit
constexpr int64_t kInline = 1 << 16;     // products: less work is done before other threads would have woken up
constexpr int64_t kEncodeRows = 32;
constexpr float kNone = -std::numeric_limits<float>::infinity();

enum Status : int { OK = 0, NO_LEVEL = 1, NO_MEMORY = 2 };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory aligned to 64 bytes at least that grows and is kept. Throws bad_alloc.
//
// Much of it is asked of the system, in huge pages: pages that the allocator has used before would stay small, and lie
// anywhere in the sets of a core's own cache.
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    char* get(size_t size) {
        if (size > size_) {
            release();
            data_ = size < kPage ? static_cast<char*>(::operator new(size, kAlign)) : map(size_t(round_up(size, kPage)));
            size_ = size < kPage ? size : size_t(round_up(size, kPage));
        }
        return data_;
    }

private:
    static constexpr size_t kPage = 2 << 20;
    static constexpr std::align_val_t kAlign{64};

#if defined(__linux__)
    static char* map(size_t size) {
        void* found = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) throw std::bad_alloc();
        char* const at = static_cast<char*>(found);
        const size_t before = size_t(-reinterpret_cast<uintptr_t>(at)) % kPage;  // to where huge pages begin
        if (before) munmap(at, before);
        munmap(at + before + size, kPage - before);
        madvise(at + before, size, MADV_HUGEPAGE);  // may be refused
        return at + before;
    }
    static void unmap(char* at, size_t size) { munmap(at, size); }
#else
    static char* map(size_t size) { return static_cast<char*>(::operator new(size, kAlign)); }
    static void unmap(char* at, size_t) { ::operator delete(at, kAlign); }
#endif

    void release() {
        if (data_ != nullptr && size_ >= kPage) unmap(data_, size_);
        if (data_ != nullptr && size_ < kPage) ::operator delete(data_, kAlign);
        data_ = nullptr;
        size_ = 0;
    }

    char* data_ = nullptr;
    size_t size_ = 0;
};

thread_local Buffer scratch;   // of the thread: kernels' own memory
thread_local Buffer partials;  // of the caller: what splits wait in until the last of their row block is done

struct Part {
    float *out, *top, *total;
};

// Query rows row_first .. row_first + rows - 1 of every KV head, and the keys that any of them may see.
struct Block {
    int64_t row_first, rows, first, stop;
    int64_t splits, keys;      // splits of `keys` keys, the first and the last maybe shorter
    int64_t first_unit;        // of all units
    int64_t first_part;        // in floats; -1 with one split, whose result stays with its thread
    int64_t first_counter;
};

// How one call is cut up. Depends on sizes and on the number of threads alone, so that two runs give the same bits.
struct Plan {
    int64_t groups, heads;     // query heads per KV head; KV heads of all sequences
    int64_t units = 0, part_floats = 0, counters = 0, products = 0;
    std::vector<Block> blocks;
};

int64_t part_size(const Attend& a, int64_t rows) { return round_up(rows * (int64_t(a.v_dim) + 2), 16); }

Part part_at(const Attend& a, float* data, int64_t rows) {
    float* top = data + rows * a.v_dim;
    return {data, top, top + rows};
}

Plan plan_of(const Attend& a) {
    Plan plan;
    plan.groups = a.q_heads / a.kv_heads;
    plan.heads = int64_t(a.batch) * a.kv_heads;
    const int64_t rows = int64_t(a.q_len) * plan.groups;
    int64_t most = kMostRows;
    while (most > kRows && plan.heads * ceil_div(rows, most) < kUnitsPerThread * a.threads) most /= 2;
    const int64_t count = ceil_div(rows, most), size = std::min(most, round_up(ceil_div(rows, count), kRowStep));
    const int64_t wanted = a.threads > 1 ? ceil_div(kUnitsPerThread * a.threads, plan.heads * count) : 1;
    // from the last block on: it sees the most keys under a causal mask, and long units come first
    for (int64_t i = ceil_div(rows, size) - 1; i >= 0; --i) {
        Block b{};
        b.row_first = i * size;
        b.rows = std::min(size, rows - b.row_first);
        const int64_t low = a.q_first + b.row_first / plan.groups;
        const int64_t high = a.q_first + (b.row_first + b.rows - 1) / plan.groups;
        b.first = a.window ? std::max(a.kv_first, low - a.window + 1) : a.kv_first;
        b.stop = a.causal || a.window ? std::min(a.kv_stop, high + 1) : a.kv_stop;
        const int64_t keys = std::max<int64_t>(0, b.stop - b.first);
        b.splits = std::clamp<int64_t>(keys / kLeastKeys, 1, wanted);
        b.keys = round_up(ceil_div(keys, b.splits), kKeyStep);
        b.splits = std::max<int64_t>(1, b.keys ? ceil_div(keys, b.keys) : 1);
        b.first_unit = plan.units;
        b.first_part = b.splits > 1 ? plan.part_floats : -1;
        b.first_counter = plan.counters;
        plan.units += plan.heads * b.splits;
        plan.products += plan.heads * b.rows * keys * (int64_t(a.k_dim) + a.v_dim);
        if (b.splits > 1) {
            plan.part_floats += plan.heads * b.splits * part_size(a, b.rows);
            plan.counters += plan.heads;
        }
        plan.blocks.push_back(b);
    }
    return plan;
}

struct AttendCall {
    const Attend& a;
    const Kernels& kernels;
    const Plan& plan;
    float* parts;
    std::atomic<int32_t>* counters;
    std::atomic<int64_t> next{0};
    std::atomic<int> status{OK};

    // A unit's query rows, its KV head among those of all sequences, its split and first position; where splits are counted from.
    struct Place {
        const Block* b;
        int64_t head, split, first, origin;
    };
    Place place_of(int64_t index) const {
        const Block* b = plan.blocks.data();
        while (b + 1 < plan.blocks.data() + plan.blocks.size() && b[1].first_unit <= index) ++b;
        const int64_t head = (index - b->first_unit) / b->splits, split = (index - b->first_unit) % b->splits;
        // splits begin at multiples of kKeyStep from the first key held; the first takes what lies before its end
        const int64_t origin = a.kv_first + (b->first - a.kv_first) / kKeyStep * kKeyStep;
        return {b, head, split, split == 0 ? b->first : origin + split * b->keys, origin};
    }

    // next_index: of the unit that this thread takes next, or beyond the last if that is not known
    void unit(int64_t index, int64_t next_index) {
        const auto [b, head, split, first, origin] = place_of(index);
        const int64_t size = part_size(a, b->rows);
        const size_t own = b->splits > 1 ? 0 : size_t(round_up(size * sizeof(float), 64));
        char* memory = scratch.get(own + kernels.attend_scratch(a, int(b->rows)));
        float* data = reinterpret_cast<float*>(memory);
        if (b->splits > 1) data = parts + b->first_part + (head * b->splits + split) * size;
        const Part part = part_at(a, data, b->rows);

        Unit u{};
        u.batch = int32_t(head / a.kv_heads);
        u.kv_head = int32_t(head % a.kv_heads);
        u.row_first = int32_t(b->row_first);
        u.rows = int32_t(b->rows);
        u.first = first;
        u.stop = split == b->splits - 1 ? b->stop : origin + (split + 1) * b->keys;
        u.out = part.out, u.top = part.top, u.total = part.total, u.alone = b->splits == 1;
        u.next_first = -1;
        if (next_index < plan.units) {
            const Place next = place_of(next_index);
            u.next_batch = int32_t(next.head / a.kv_heads), u.next_head = int32_t(next.head % a.kv_heads), u.next_first = next.first;
        }
        if (u.first < u.stop) {
            if (kernels.attend(a, u, memory + own)) return;
        } else {
            std::fill_n(part.out, b->rows * a.v_dim, 0.0f);
            std::fill_n(part.top, b->rows, kNone);
            std::fill_n(part.total, b->rows, 0.0f);
        }
        if (b->splits == 1) return kernels.finish(a, u, data, size, 1);
        if (counters[b->first_counter + head].fetch_sub(1, std::memory_order_acq_rel) == 1)
            kernels.finish(a, u, parts + b->first_part + head * b->splits * size, size, b->splits);
    }

    static void work(void* self) {
        auto& call = *static_cast<AttendCall*>(self);
        try {
            auto claim = [&] { return call.next.fetch_add(1, std::memory_order_relaxed); };
            // units of one length are claimed early, so that the keys of the next can be asked for
            const bool early = call.plan.blocks.size() == 1;
            for (int64_t i = claim(), next; i < call.plan.units; i = next) {
                if (early) next = claim();
                call.unit(i, early ? next : call.plan.units);
                if (!early) next = claim();
            }
        } catch (const std::bad_alloc&) {
            call.status = NO_MEMORY;
        }
    }
};

struct EncodeCall {
    const Encode& e;
    const Kernels& kernels;
    int64_t rows;
    std::atomic<int64_t> next{0};
    std::atomic<int> status{OK};

    static void work(void* self) {
        auto& call = *static_cast<EncodeCall*>(self);
        try {
            char* memory = scratch.get(call.kernels.encode_scratch(call.e));
            for (int64_t row; (row = call.next.fetch_add(kEncodeRows, std::memory_order_relaxed)) < call.rows;)
                call.kernels.encode(call.e, row, std::min(kEncodeRows, call.rows - row), memory);
        } catch (const std::bad_alloc&) {
            call.status = NO_MEMORY;
        }
    }
};

const std::vector<std::string>& lacks() {
    static const std::vector<std::string> all = [] {
        std::vector<std::string> found;
        for (const Kernels* k : kLevels) found.push_back(lacks_of(k->name));
        return found;
    }();
    return all;
}

bool runs(int level) { return level >= 0 && level < kCount && lacks()[level].empty(); }

}  // namespace
}  // namespace gyrokv

using namespace gyrokv;

#define GYROKV_API extern "C" __attribute__((visibility("default")))

// The instruction sets that were built, best first; null beyond the last.
GYROKV_API const char* gyrokv_level(int level) { return level >= 0 && level < kCount ? kLevels[level]->name : nullptr; }

// Why this machine cannot run one, in words; empty when it can. Asks for AMX tiles where they must be asked for.
GYROKV_API const char* gyrokv_lacks(int level) {
    return level >= 0 && level < kCount ? lacks()[level].c_str() : "there is no such level";
}

// Instruction sets that were not built, and why.
GYROKV_API const char* gyrokv_left_out() { return GYROKV_LEFT_OUT; }

// Digest of the sources.
GYROKV_API const char* gyrokv_digest() { return GYROKV_DIGEST; }

GYROKV_API const char* gyrokv_compiler() {
#if defined(__clang__)
    return __VERSION__;  // begins with its name
#else
    return "GCC " __VERSION__;
#endif
}

// Size of the structures that Python mirrors, in the order of core.h.
GYROKV_API int64_t gyrokv_size(int which) {
    constexpr int64_t kSizes[] = {sizeof(Format), sizeof(Rows), sizeof(Run), sizeof(Turn), sizeof(Attend), sizeof(Encode)};
    return which >= 0 && which < 6 ? kSizes[which] : 0;
}

// `parallel`: the address of GOMP_parallel, or null for threads of our own.
GYROKV_API void gyrokv_team(void* parallel) { threads.use(reinterpret_cast<Team>(parallel)); }

GYROKV_API int gyrokv_attend(const Attend* a, int level) {
    if (!runs(level)) return NO_LEVEL;
    try {
        const Plan plan = plan_of(*a);
        const size_t parts = size_t(plan.part_floats) * sizeof(float);
        char* memory = plan.part_floats ? partials.get(parts + plan.counters * sizeof(std::atomic<int32_t>)) : nullptr;
        auto* counters = reinterpret_cast<std::atomic<int32_t>*>(memory + parts);
        for (const Block& b : plan.blocks) {
            for (int64_t h = 0; b.splits > 1 && h < plan.heads; ++h)
                new (counters + b.first_counter + h) std::atomic<int32_t>(int32_t(b.splits));
        }
        AttendCall call{*a, *kLevels[level], plan, reinterpret_cast<float*>(memory), counters};
        const bool alone = plan.units == 1 || plan.products <= kInline;
        threads.run(alone ? 1 : a->threads, AttendCall::work, &call);
        return call.status;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

GYROKV_API int gyrokv_encode(const Encode* e, int level) {
    if (!runs(level)) return NO_LEVEL;
    try {
        EncodeCall call{*e, *kLevels[level], int64_t(e->batch) * e->heads * e->tokens};
        const bool alone = call.rows <= kEncodeRows || call.rows * e->padded <= kInline;
        threads.run(alone ? 1 : e->threads, EncodeCall::work, &call);
        return call.status;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
