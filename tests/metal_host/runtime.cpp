// Runs a kernel on the CPU: one fiber per GPU thread, one threadgroup at a time.
//
// Kernels are compiled with -fsanitize=thread, but the hooks are those below: the compiler announces every access to
// memory that other threads might see. Each is looked up: the thread's own stack, the library's constants, threadgroup
// memory, a buffer, or nothing, which ends the run. Accesses of one place by two threads with no barrier between them,
// at least one a write, are races. Barriers order as Metal says: those of the threadgroup all of its threads, those of
// a SIMD-group its lanes; SIMD-group operations order nothing.
#include "runtime.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" char __ehdr_start, _end;  // first and last byte of this library

namespace metal_host {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGap = size_t(64) << 20;     // between buffers, so that no stride leads from one into another
constexpr size_t kRedZone = 256;              // between threadgroup arrays
constexpr size_t kArena = 4 * kThreadgroup;
constexpr unsigned kMessages = 8;

// -- fibers

#if defined(__x86_64__)
struct Context {
  void* sp = nullptr;
};
extern "C" void metal_host_switch(void** from, void* to);
asm(R"(
.text
.globl metal_host_switch
.hidden metal_host_switch
.type metal_host_switch, @function
metal_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size metal_host_switch, .-metal_host_switch
)");
void enter(Context& context, char* stack, void (*start)()) {
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t(15));
  *--top = nullptr;  // a return address that is never used, and the alignment that a call would leave
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.sp = top;
}
void switch_to(Context& from, Context& to) { metal_host_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t state;
};
void enter(Context& context, char* stack, void (*start)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStack;
  context.state.uc_link = nullptr;
  makecontext(&context.state, start, 0);
}
void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

enum State : uint8_t { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  Position at;
  uint32_t order = 0;      // SIMD-group barriers passed
  uint64_t exchanges = 0;
  size_t arena = 0, arrays = 0;
  const char* waiting = "";
};

struct Simdgroup {
  unsigned lanes = 0, arrived = 0, at_barrier = 0;
  const char* operation = nullptr;
  alignas(16) unsigned char values[2][kLanes][16];
};

// Who touched a byte of a buffer, or two of threadgroup memory, last, since when: enough to tell whether a barrier lies between.
struct Touch {
  uint32_t group = 0, epoch = 0, order = 0;  // group 0: nobody
  uint16_t simdgroup = 0, thread = 0;        // kMany: several
};
constexpr uint16_t kMany = 0xFFFF;
struct Shadow {
  Touch write, read;
};

struct Mapped {
  char* data;
  size_t bytes;
  bool writable;
  const char* name;
  std::vector<Shadow> shadow;
};

struct Run {
  std::vector<Mapped> buffers;
  Kernel kernel = nullptr;
  unsigned threads = 0, group = 0;  // group: serial number from 1
  uint32_t epoch = 0, device_epoch = 0;
  unsigned at_barrier = 0, done = 0;
  bool threadgroup_fence = false, device_fence = false;
  int schedule = kForward;
  uint64_t random = 1;
  size_t arena_used = 0;  // without red zones
  Fiber* now = nullptr;
  Context scheduler;
  bool stopped = false;
  size_t last = 0;  // the buffer that was accessed last
};

Run run;
std::vector<Fiber> fibers;
State states[kThreads];  // of the fibers, close together because the scheduler scans them
Simdgroup simdgroups[kThreads / kLanes];  // static, as all that compiled kernels read of this file
void* pointers[64];
std::vector<Shadow> arena_shadow;
struct Array {
  size_t start, bytes;
  const char* name;
};
std::vector<Array> arrays;
char* arena;
size_t arena_top;
char report[8192];
size_t reported;
unsigned messages, races, out_of_bounds;
uint64_t accesses;

void say(const char* format, ...) {
  if (messages++ >= kMessages || reported >= sizeof report) return;
  va_list list;
  va_start(list, format);
  const int n = vsnprintf(report + reported, sizeof report - reported, format, list);
  va_end(list);
  if (n > 0) reported += size_t(n);
}

size_t offset_of(const void* pc) { return size_t(static_cast<const char*>(pc) - &__ehdr_start); }

uint64_t next_random() {
  run.random ^= run.random << 13;
  run.random ^= run.random >> 7;
  run.random ^= run.random << 17;
  return run.random;
}

void yield() { switch_to(run.now->context, run.scheduler); }

[[noreturn]] void stop() {
  run.stopped = true;
  for (;;) yield();
}

// -- races

bool ordered(const Touch& before, const Touch& now, bool shared) {
  if (before.group == 0) return true;
  if (before.group != now.group) return !shared;  // threadgroups run in any order, each with its own memory
  if (before.epoch != now.epoch) return true;
  if (before.simdgroup != now.simdgroup) return false;
  return before.order != now.order || before.thread == now.thread;
}

void touch(Shadow* shadow, size_t first, size_t last, bool write, const Touch& now, bool shared, const char* where,
           const void* pc) {
  for (size_t i = first; i <= last; ++i) {
    Shadow& s = shadow[i];
    const bool raced = !ordered(s.write, now, shared) || (write && !ordered(s.read, now, shared));
    if (raced) {
      const Touch& other = !ordered(s.write, now, shared) ? s.write : s.read;
      ++races;
      say("race: %s byte %zu, %s by thread %u of SIMD-group %u, not ordered after the %s by thread %d @%zx\n", where,
          shared ? i : 2 * i,
          write ? "written" : "read", now.thread, now.simdgroup, &other == &s.write ? "write" : "read",
          other.thread == kMany ? -1 : other.thread, offset_of(pc));
    }
    if (write) {
      s.write = now;
    } else {
      Touch& r = s.read;
      if (r.group != now.group || r.epoch != now.epoch) {
        r = now;
      } else if (r.simdgroup != now.simdgroup) {
        r.simdgroup = kMany;
      } else if (r.order != now.order) {
        r = now;
      } else if (r.thread != now.thread) {
        r.thread = kMany;
      }
    }
    if (raced) break;
  }
}

void in_arena(size_t at, size_t bytes, bool write, const void* pc) {
  if (run.schedule == kLockstep || (run.schedule == kRandom && next_random() % 8 == 0)) yield();
  for (const Array& a : arrays) {
    if (at >= a.start && at + bytes <= a.start + a.bytes) {
      const Fiber& f = *run.now;
      const Touch now{run.group, run.epoch, f.order, uint16_t(f.at.simdgroup), uint16_t(f.at.index)};
      touch(arena_shadow.data(), at / 2, (at + bytes - 1) / 2, write, now, false, a.name, pc);
      return;
    }
  }
  ++out_of_bounds;
  const Array* near = nullptr;
  for (const Array& a : arrays)
    if (a.start <= at) near = &a;
  say("out of bounds: %s of %zu bytes at %td of %s[%zu bytes] @%zx\n", write ? "write" : "read", bytes,
      near ? ptrdiff_t(at - near->start) : ptrdiff_t(at), near ? near->name : "threadgroup memory", near ? near->bytes : 0,
      offset_of(pc));
  stop();
}

void on_access(const void* address, size_t bytes, bool write, const void* pc) {
  if (!run.now) return;
  const char* p = static_cast<const char*>(address);
  if (size_t(p - run.now->stack) < kStack || (p >= &__ehdr_start && p < &_end)) return;
  if (size_t(p - arena) < kArena) {
    ++accesses;
    return in_arena(size_t(p - arena), bytes, write, pc);
  }
  const Mapped* near = nullptr;
  const size_t count = run.buffers.size();
  for (size_t i = 0; i < count; ++i) {
    Mapped& b = run.buffers[(run.last + i) % count];  // most often the same one again
    const size_t at = size_t(p - b.data);
    if (at < b.bytes && at + bytes <= b.bytes) {
      ++accesses;
      run.last = (run.last + i) % count;
      if (!b.writable) {
        if (!write) return;
        ++out_of_bounds;
        say("write to the read-only buffer %s at byte %zu @%zx\n", b.name, at, offset_of(pc));
        stop();
      }
      const Fiber& f = *run.now;
      const Touch now{run.group, run.device_epoch, f.order, uint16_t(f.at.simdgroup), uint16_t(f.at.index)};
      touch(b.shadow.data(), at, at + bytes - 1, write, now, true, b.name, pc);
      return;
    }
    if (p + kGap / 2 >= b.data && p < b.data + b.bytes + kGap / 2) near = &b;
  }
  ++out_of_bounds;
  say("out of bounds: %s of %zu bytes at %td of %s[%zu bytes] @%zx\n", write ? "write" : "read", bytes,
      near ? p - near->data : ptrdiff_t(0), near ? near->name : "no buffer", near ? near->bytes : 0, offset_of(pc));
  stop();
}

// -- a threadgroup

void start_fiber() {
  Fiber& f = *run.now;
  const Position at = f.at;
  run.kernel(pointers, at);
  states[f.at.index] = kDone;
  ++run.done;
  for (;;) yield();
}

Fiber* choose(unsigned turn) {  // turn <= number of threads
  const unsigned n = run.threads;
  if (run.schedule == kRandom) {
    for (int i = 0; i < 8; ++i) {
      const unsigned k = next_random() % n;
      if (states[k] == kReady) return &fibers[k];
    }
  }
  for (unsigned i = 0; i < n; ++i) {
    unsigned k = turn + i < n ? turn + i : turn + i - n;
    if (run.schedule == kReverse) k = n - 1 - k;
    if (states[k] == kReady) return &fibers[k];
  }
  return nullptr;
}

void run_group() {
  memset(arena, 0xFF, kArena);  // NaN in every float type
  arrays.clear();
  arena_top = 0;
  run.arena_used = 0;
  run.epoch = run.device_epoch = 0;
  run.at_barrier = run.done = 0;
  run.threadgroup_fence = run.device_fence = false;
  for (Simdgroup& s : simdgroups) s = Simdgroup();
  for (unsigned i = 0; i < run.threads; ++i) {
    Fiber& f = fibers[i];
    states[i] = kReady;
    f.order = 0;
    f.exchanges = f.arena = f.arrays = 0;
    f.waiting = "";
    enter(f.context, f.stack, start_fiber);
    ++simdgroups[f.at.simdgroup].lanes;
  }
  for (unsigned turn = 0; run.done < run.threads && !run.stopped;) {
    Fiber* f = choose(turn);
    if (!f) {
      unsigned waiting[4] = {};
      const char* at = "";
      for (unsigned i = 0; i < run.threads; ++i) {
        ++waiting[states[i]];
        if (states[i] == kAtExchange) at = fibers[i].waiting;
      }
      say("stuck: %u threads at a barrier, %u at the SIMD-group operation %s, %u have ended\n", waiting[kAtBarrier],
          waiting[kAtExchange], at, waiting[kDone]);
      run.stopped = true;
      break;
    }
    run.now = f;
    switch_to(run.scheduler, f->context);
    run.now = nullptr;
    const unsigned k = unsigned(f - fibers.data());
    turn = (run.schedule == kReverse ? run.threads - 1 - k : k) + 1;
  }
}

}  // namespace

unsigned lane() { return run.now->at.lane; }

void fail(const char* message) {
  say("%s\n", message);
  stop();
}

const unsigned char* exchange(const void* value, unsigned bytes, const char* operation) {
  Fiber& f = *run.now;
  Simdgroup& s = simdgroups[f.at.simdgroup];
  const unsigned slot = f.exchanges++ & 1;
  memcpy(s.values[slot][f.at.lane], value, bytes);
  if (s.arrived == 0) {
    s.operation = operation;
  } else if (s.operation != operation && strcmp(s.operation, operation) != 0) {
    say("lanes of a SIMD-group meet at %s and at %s\n", s.operation, operation);
    stop();
  }
  if (++s.arrived == s.lanes) {
    s.arrived = 0;
    State* lanes = states + f.at.simdgroup * kLanes;
    for (unsigned i = 0; i < s.lanes; ++i)
      if (lanes[i] == kAtExchange) lanes[i] = kReady;
  } else {
    states[f.at.index] = kAtExchange;
    f.waiting = operation;
    yield();
  }
  return &s.values[slot][0][0];
}

float reduce(float value, Reduction reduction) {
  static const char* const names[] = {"simd_sum", "simd_max", "simd_min"};
  const unsigned char* all = exchange(&value, sizeof value, names[reduction]);
  float part[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) memcpy(&part[i], all + 16 * i, sizeof value);
  for (unsigned h = kLanes / 2; h; h /= 2)
    for (unsigned i = 0; i < h; ++i) {
      const float x = part[i], y = part[i + h];
      part[i] = reduction == kSum ? x + y : (reduction == kMax ? x < y : y < x) ? y : x;
    }
  return part[0];
}

void multiply(const float a[2], const float b[2], const float c[2], float d[2]) {
  const float mine[4] = {a[0], a[1], b[0], b[1]};
  const unsigned row = row_of(lane()), column = column_of(lane());
  const unsigned char* all = exchange(mine, sizeof mine, "simdgroup_multiply");
  const auto at = [all](unsigned r, unsigned c) {  // the lane that holds (r, c) and (r, c + 1)
    return reinterpret_cast<const float*>(all + 16 * ((r & 4) << 2 | (c & 4) << 1 | (r & 3) << 1 | (c >> 1 & 1)));
  };
  for (unsigned i = 0; i < 2; ++i) {
    float sum = c[i];
    for (unsigned k = 0; k < 8; ++k) sum += at(row, k)[k & 1] * at(k, column)[2 + i];
    d[i] = sum;
  }
}

void barrier(bool simdgroup, bool threadgroup_memory, bool device_memory) {
  Fiber& f = *run.now;
  if (simdgroup) {
    exchange(&f, 1, threadgroup_memory ? "simdgroup_barrier" : "simdgroup_barrier(mem_none)");
    f.order += threadgroup_memory;
    return;
  }
  run.threadgroup_fence |= threadgroup_memory;
  run.device_fence |= device_memory;
  if (++run.at_barrier == run.threads) {
    run.at_barrier = 0;
    run.epoch += run.threadgroup_fence;
    run.device_epoch += run.device_fence;
    run.threadgroup_fence = run.device_fence = false;
    for (unsigned i = 0; i < run.threads; ++i)
      if (states[i] == kAtBarrier) states[i] = kReady;
  } else {
    states[f.at.index] = kAtBarrier;
    yield();
  }
}

void* threadgroup_array(size_t bytes, const char* name) {
  Fiber& f = *run.now;
  if (f.arrays == arrays.size()) {
    if (f.arena + bytes > kArena - kRedZone) fail("threadgroup memory: far too much");
    arrays.push_back({f.arena, bytes, name});
    run.arena_used += (bytes + 15) / 16 * 16;
    if (run.arena_used > kThreadgroup) fail("threadgroup memory: more than 32768 bytes");
  }
  char* p = arena + f.arena;
  f.arena += (bytes + 15) / 16 * 16 + kRedZone;
  ++f.arrays;
  return p;
}

}  // namespace metal_host

using namespace metal_host;

struct Outcome {
  uint64_t accesses, threadgroup_bytes;
  uint32_t races, out_of_bounds, messages;
  char text[8192];
};

// Runs `kernel` over `groups` threadgroups of `threads`; buffers are copied in, and back if they are writable.
extern "C" __attribute__((visibility("default"))) void metal_host_run(
    Kernel kernel, const Buffer* buffers, unsigned n, const unsigned* groups, const unsigned* threads, int schedule,
    uint64_t seed, Outcome* outcome) {
  run = Run();
  run.kernel = kernel;
  run.schedule = schedule;
  run.random = seed * 0x9E3779B97F4A7C15u + 1;
  run.threads = threads[0] * threads[1] * threads[2];
  messages = races = out_of_bounds = 0;
  reported = 0;
  accesses = 0;
  report[0] = 0;
  *outcome = Outcome();
  if (run.threads == 0 || run.threads > kThreads || n > 31) {
    const char* format = "%u threads in a threadgroup and %u buffers; there may be 1 to 1024 and at most 31\n";
    snprintf(outcome->text, sizeof outcome->text, format, run.threads, n);
    outcome->messages = 1;
    return;
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!arena) {
    arena = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE, flags, -1, 0));
    arena_shadow.resize(kArena / 2);
  }
  for (Shadow& s : arena_shadow) s = Shadow();
  while (fibers.size() < run.threads) {
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  size_t total = kGap;
  for (unsigned i = 0; i < n; ++i) total += (buffers[i].bytes + 4095) / 4096 * 4096 + kGap;
  char* memory = static_cast<char*>(mmap(nullptr, total, PROT_READ | PROT_WRITE, flags, -1, 0));
  char* next = memory + kGap;
  for (unsigned i = 0; i < n; ++i) {
    memcpy(next, buffers[i].data, buffers[i].bytes);
    run.buffers.push_back({next, buffers[i].bytes, buffers[i].writable != 0, buffers[i].name, {}});
    if (buffers[i].writable) run.buffers.back().shadow.resize(buffers[i].bytes);
    pointers[i] = next;
    next += (buffers[i].bytes + 4095) / 4096 * 4096 + kGap;
  }
  for (unsigned z = 0; z < groups[2] && !run.stopped; ++z)
    for (unsigned y = 0; y < groups[1] && !run.stopped; ++y)
      for (unsigned x = 0; x < groups[0] && !run.stopped; ++x) {
        ++run.group;
        for (unsigned i = 0; i < run.threads; ++i) {
          Position& at = fibers[i].at;
          const unsigned own[3] = {i % threads[0], i / threads[0] % threads[1], i / (threads[0] * threads[1])};
          const unsigned group[3] = {x, y, z};
          for (int d = 0; d < 3; ++d) {
            at.thread[d] = own[d];
            at.group[d] = group[d];
            at.grid[d] = group[d] * threads[d] + own[d];
            at.groups[d] = groups[d];
            at.threads[d] = threads[d];
          }
          at.index = i;
          at.lane = i % kLanes;
          at.simdgroup = i / kLanes;
          at.simdgroups = (run.threads + kLanes - 1) / kLanes;
        }
        run_group();
      }
  for (unsigned i = 0; i < n; ++i)
    if (buffers[i].writable) memcpy(buffers[i].data, run.buffers[i].data, buffers[i].bytes);
  munmap(memory, total);
  outcome->accesses = accesses;
  outcome->threadgroup_bytes = run.arena_used;
  outcome->races = races;
  outcome->out_of_bounds = out_of_bounds;
  outcome->messages = messages;
  memcpy(outcome->text, report, sizeof report);
}

// -- what -fsanitize=thread calls

#define HOOK extern "C" __attribute__((visibility("default"))) void
#define ACCESS(bytes)                                                                                            \
  HOOK __tsan_read##bytes(void* p) { on_access(p, bytes, false, __builtin_return_address(0)); }                  \
  HOOK __tsan_write##bytes(void* p) { on_access(p, bytes, true, __builtin_return_address(0)); }                  \
  HOOK __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, false, __builtin_return_address(0)); }        \
  HOOK __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, true, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
HOOK __tsan_read_range(void* p, size_t n) { on_access(p, n, false, __builtin_return_address(0)); }
HOOK __tsan_write_range(void* p, size_t n) { on_access(p, n, true, __builtin_return_address(0)); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
