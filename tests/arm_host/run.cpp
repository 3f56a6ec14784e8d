// Carries out one call of a library for another instruction set: the call's structures and the memory that they point to come in a
// file, and what the library wrote goes into another. (`qemu-aarch64 run core.so level in out`; host.py writes `in`.)
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core.h"

using namespace gyrokv;

namespace {

struct Region {
    uint64_t at, size, written;
    char* here;
};
std::vector<Region> regions;

[[noreturn]] void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(90);
}

void read(FILE* from, void* to, size_t size) {
    if (size && std::fread(to, 1, size, from) != size) fail("the call's file is too short");
}

// A pointer of the caller's process to the same byte here. Empty tensors point anywhere.
template <class T>
void move(T*& p, bool may_be_empty = false) {
    const uint64_t at = reinterpret_cast<uint64_t>(p);
    for (const Region& r : regions)
        if (at >= r.at && at < r.at + r.size) {
            p = reinterpret_cast<T*>(r.here + (at - r.at));
            return;
        }
    if (p && !may_be_empty) fail("a pointer of the call is not in its memory");
    p = nullptr;
}

void move(Rows& rows) { move(rows.words), move(rows.scale, true); }

void move_turn(const Turn*& turn) {
    if (!turn) return;
    move(turn);
    auto& own = const_cast<Turn&>(*turn);
    move(own.before), move(own.after);
}

void move(Attend& a) {
    move(a.q), move(a.out), move(a.lse), move(a.mask), move(a.slopes), move(a.sinks), move(a.starts), move(a.map);
    if (a.n_runs) move(a.runs);
    for (int i = 0; i < a.n_runs; ++i) {
        auto& run = const_cast<Run&>(a.runs[i]);
        move(run.k), move(run.v), move(run.k_format), move(run.v_format);
    }
    move_turn(a.q_turn), move_turn(a.out_turn);  // never the same
}

void move(Encode& e) {
    move(e.before), move(e.after), move(e.levels), move(e.boundaries), move(e.x), move(e.words), move(e.scale, true);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 5) fail("run library level in out");
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    FILE* in = std::fopen(arguments[3], "rb");
    uint64_t header[3];  // whether rows are encoded, bytes of the structure, regions
    read(in, header, sizeof header);
    std::vector<char> call(header[1]);
    read(in, call.data(), call.size());
    for (uint64_t i = 0; i < header[2]; ++i) {
        Region r;
        read(in, &r, 3 * sizeof(uint64_t));
        r.here = static_cast<char*>(std::aligned_alloc(64, (r.size + 127) / 64 * 64));
        read(in, r.here, r.size);
        regions.push_back(r);
    }
    const int level = std::atoi(arguments[2]);
    int status;
    if (header[0]) {
        auto& e = *reinterpret_cast<Encode*>(call.data());
        move(e);
        status = reinterpret_cast<int (*)(const Encode*, int)>(dlsym(library, "gyrokv_encode"))(&e, level);
    } else {
        auto& a = *reinterpret_cast<Attend*>(call.data());
        move(a);
        status = reinterpret_cast<int (*)(const Attend*, int)>(dlsym(library, "gyrokv_attend"))(&a, level);
    }
    FILE* out = std::fopen(arguments[4], "wb");
    for (const Region& r : regions)
        if (r.written && std::fwrite(r.here, 1, r.size, out) != r.size) fail("cannot write");
    return std::fclose(out) == 0 ? status : 91;
}
