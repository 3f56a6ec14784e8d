// What the Metal stand-in (msl.h), the generated entry points and the executor (runtime.cpp) share.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace metal_host {

constexpr unsigned kLanes = 32;           // threads of a SIMD-group
constexpr unsigned kThreads = 1024;       // most threads of a threadgroup
constexpr unsigned kThreadgroup = 32768;  // bytes of threadgroup memory

enum Schedule : int { kForward, kReverse, kRandom, kLockstep };

// Where a GPU thread stands; x, y, z.
struct Position {
  unsigned group[3], grid[3], index, lane, simdgroup;
};

struct Buffer {
  void* data;
  size_t bytes;
  int32_t writable;
  const char* name;
};

using Kernel = void (*)(void** buffers, const Position&);

// All lanes of the SIMD-group hand in `bytes` (at most 16) and see what all of them handed in: [32][16 bytes].
// `operation` names it, so that lanes that meet at different operations are told apart.
const unsigned char* exchange(const void* value, unsigned bytes, const char* operation);

unsigned lane();  // of the thread that runs

// Over the lanes' values, by halves as hardware may add them.
enum Reduction { kSum, kMax };
float reduce(float value, Reduction reduction);

// d = a * b + c for 8x8 matrices of which every lane holds (row, column) and (row, column + 1), where Apple's GPUs do.
void multiply(const float a[2], const float b[2], const float c[2], float d[2]);
inline unsigned row_of(unsigned lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline unsigned column_of(unsigned lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

void barrier(bool simdgroup, bool threadgroup_memory, bool device_memory);

// `bytes` of threadgroup memory, the same for every thread of the threadgroup.
void* threadgroup_array(size_t bytes, const char* name);

// Ends the run with an error.
[[noreturn]] void fail(const char* message);

}  // namespace metal_host
