// The machine of machine.cuh, imitated on the host: every CUDA thread of a block is a fiber, and
// the operations of a warp run lane by lane after the PTX ISA's fragment layouts.
//
// It is stricter than a GPU. A launch stops with a message on
//   * an address outside the buffers of the launch or the block's shared memory, or misaligned;
//   * shared memory that is read before it is written, or that two threads touch between barriers
//     where one of them writes (a race), or that a copy was not waited for;
//   * an element of global memory that is written twice;
//   * lanes of a warp that meet different operations, and threads that wait for each other forever.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

typedef unsigned short f16;
typedef unsigned int u32;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

namespace simt {

struct Index {
  unsigned x, y, z;
};

// Registered global memory; `written` counts stores per two bytes where it may be written.
struct Buffer {
  unsigned char* begin;
  size_t bytes;
  bool writable;
  std::vector<unsigned char> written;
};

struct Copy {
  unsigned char* to;
  unsigned char data[16];
};

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr int SLOT_BYTES = 64;

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, done = false, waits = false;
  Index index{};
  int lane = 0, warp = 0;
  long operations = 0;
  int turn = 0;
  std::vector<Copy> pending, committed;
};

struct Warp {
  long arrived[2] = {0, 0};
  int kind[2][32];
  alignas(16) unsigned char slots[2][32][SLOT_BYTES];
};

// Who touched two bytes of shared memory last: after which barrier of the block (epoch), and after
// which barrier of the warp (turn).
struct Touch {
  int write_epoch = -1, writer = -1, write_turn = -1;
  int read_epoch = -1, reader = -1, reading_warp = -1, read_turn = -1;
};
constexpr int SEVERAL = -2;

struct Block {
  Index index{}, size{};
  std::vector<Buffer>* buffers = nullptr;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Touch> touched;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> stacks;
  Fiber* running = nullptr;
  int epoch = 0;
  jmp_buf scheduler;
  std::string problem;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
};

inline Block*& block_pointer() {
  static thread_local Block* pointer = nullptr;
  return pointer;
}
inline Block& block() { return *block_pointer(); }
inline Fiber& self() { return *block().running; }

__attribute__((noinline)) inline void yield() {
  if (!_setjmp(self().at)) _longjmp(block().scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  Block& b = block();
  char place[160];
  std::snprintf(place, sizeof place, " (thread %u of block %u, %u)", self().index.x, b.index.x,
                b.index.y);
  b.problem = what + place;
  _longjmp(b.scheduler, 2);
}

// ---- memory ----
inline void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<size_t>(pointer) % bytes) fail("misaligned address");
}

inline Buffer& check_global(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes);
  const auto* at = static_cast<const unsigned char*>(pointer);
  for (Buffer& buffer : *block().buffers)
    if (at >= buffer.begin && at + bytes <= buffer.begin + buffer.bytes) return buffer;
  fail("address outside the buffers of the launch");
}

inline void note_global_write(const void* pointer, size_t bytes) {
  Buffer& buffer = check_global(pointer, bytes);
  if (!buffer.writable) fail("write to an input");
  const size_t first = static_cast<const unsigned char*>(pointer) - buffer.begin;
  for (size_t unit = first / 2; unit < (first + bytes) / 2; unit++)
    if (buffer.written[unit]++) fail("element of global memory written twice");
}

inline size_t check_shared(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes);
  const auto* at = static_cast<const unsigned char*>(pointer);
  Block& b = block();
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes)
    fail("address outside the block's shared memory");
  return at - b.shared;
}

// Whether a warp's barrier lies between an earlier touch, by another lane, and now.
inline bool ordered_in_warp(int warp, int turn) {
  return warp == self().warp && turn < self().turn;
}

inline void note_shared_read(const void* pointer, size_t bytes) {
  const size_t first = check_shared(pointer, bytes);
  Block& b = block();
  const int me = self().index.x;
  for (size_t unit = first / 2; unit < (first + bytes) / 2; unit++) {
    Touch& touch = b.touched[unit];
    if (touch.write_epoch < 0) fail("shared memory read before it is written");
    if (touch.write_epoch == b.epoch && touch.writer != me &&
        !ordered_in_warp(touch.writer / 32, touch.write_turn))
      fail("race: read of what another thread wrote since the last barrier");
    const bool again = touch.read_epoch == b.epoch;
    touch.reader = again && touch.reader != me ? SEVERAL : me;
    touch.reading_warp = again && touch.reading_warp != self().warp ? SEVERAL : self().warp;
    touch.read_epoch = b.epoch;
    touch.read_turn = self().turn;
  }
}

inline void note_shared_write(const void* pointer, size_t bytes) {
  const size_t first = check_shared(pointer, bytes);
  Block& b = block();
  const int me = self().index.x;
  for (size_t unit = first / 2; unit < (first + bytes) / 2; unit++) {
    Touch& touch = b.touched[unit];
    if (touch.write_epoch == b.epoch && touch.writer != me &&
        !ordered_in_warp(touch.writer / 32, touch.write_turn))
      fail("race: two threads write since the last barrier");
    if (touch.read_epoch == b.epoch && touch.reader != me &&
        !ordered_in_warp(touch.reading_warp, touch.read_turn))
      fail("race: write to what another thread read since the last barrier");
    touch.write_epoch = b.epoch;
    touch.writer = me;
    touch.write_turn = self().turn;
  }
}

// ---- operations of a warp ----
enum Kind { SHUFFLE, SYNCHRONIZE, LOAD, LOAD_TRANSPOSED, MULTIPLY };

// Gives `mine` to the other lanes and returns the 32 lanes' values, once all have come.
template <typename T>
const T* exchange(const T& mine, Kind kind) {
  static_assert(sizeof(T) == SLOT_BYTES, "one slot each");
  Fiber& fiber = self();
  Warp& warp = *block().warps[fiber.warp];
  const int side = fiber.operations % 2;
  const long wanted = 32 * (fiber.operations / 2 + 1);
  fiber.operations++;
  std::memcpy(warp.slots[side][fiber.lane], &mine, sizeof mine);
  warp.kind[side][fiber.lane] = kind;
  warp.arrived[side]++;
  while (warp.arrived[side] < wanted) yield();
  for (int lane = 0; lane < 32; lane++)
    if (warp.kind[side][lane] != kind) fail("lanes of a warp meet different operations");
  return reinterpret_cast<const T*>(warp.slots[side]);
}

struct alignas(16) Word {
  float value;
  unsigned char rest[SLOT_BYTES - sizeof(float)];
};
struct alignas(16) Row {
  f16 values[8];
  unsigned char rest[SLOT_BYTES - 16];
};
struct alignas(16) Operands {
  float a[8], b[4];
  unsigned char rest[SLOT_BYTES - 48];
};

// ---- half precision ----
inline float half_to_float(f16 bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 31)
    value =
        fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else if (exponent)
    value = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  else
    value = std::ldexp(static_cast<float>(fraction), -24);
  return bits & 0x8000 ? -value : value;
}

inline const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int bits = 0; bits < 65536; bits++) values[bits] = half_to_float(static_cast<f16>(bits));
    return values;
  }();
  return table.data();
}

// To the nearest, ties to even.
inline f16 float_to_half(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<f16>(sign | 0x7fff);
  if (magnitude >= 0x477ff000) return static_cast<f16>(sign | 0x7c00);  // 65520 and above
  if (magnitude < 0x38800000) {  // subnormal: a multiple of 2^-24
    const float steps = std::nearbyint(std::ldexp(std::fabs(value), 24));
    return static_cast<f16>(sign | static_cast<u32>(steps));
  }
  const u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<f16>(sign | (rounded - 0x38000000) >> 13);
}

inline void load_matrices(u32 (&out)[4], const f16* row, Kind kind) {
  check_alignment(row, 16);
  note_shared_read(row, 16);
  Row mine;
  std::memcpy(mine.values, row, 16);
  const Row* rows = exchange(mine, kind);
  const int g = self().lane / 4, q = self().lane % 4;
  for (int i = 0; i < 4; i++) {
    const bool across = kind == LOAD_TRANSPOSED;
    const f16 low = across ? rows[i * 8 + 2 * q].values[g] : rows[i * 8 + g].values[2 * q];
    const f16 high = across ? rows[i * 8 + 2 * q + 1].values[g] : rows[i * 8 + g].values[2 * q + 1];
    out[i] = low | static_cast<u32>(high) << 16;
  }
}

}  // namespace simt

#define threadIdx (simt::self().index)
#define blockIdx (simt::block().index)
#define blockDim (simt::block().size)
#define RR_DEVICE inline
#define RR_KERNEL(threads, blocks_per_sm) extern "C" void
#define RR_PARAMETER(type, name) const type& name  // simt_launch passes its address
#define RR_SHARED(name) unsigned char* name = simt::block().shared

inline void rr_barrier() {
  simt::Fiber& fiber = simt::self();
  fiber.waits = true;
  while (fiber.waits) simt::yield();
}

inline void rr_warp_barrier() {
  simt::exchange(simt::Word{}, simt::SYNCHRONIZE);
  simt::self().turn++;
}

inline float rr_shuffle_xor(float value, int distance) {
  simt::Word mine{};
  mine.value = value;
  return simt::exchange(mine, simt::SHUFFLE)[simt::self().lane ^ distance].value;
}

inline void rr_release_dependents() {}
inline void rr_wait_for_prior_grid() {}

template <typename T>
T rr_load(const T* pointer) {
  simt::check_global(pointer, sizeof(T));
  return *pointer;
}

template <typename T>
T rr_load_coherent(const T* pointer) {
  return rr_load(pointer);
}

template <typename T>
void rr_store(T* pointer, T value) {
  simt::note_global_write(pointer, sizeof(T));
  *pointer = value;
}

template <typename T>
T rr_load_shared(const T* pointer) {
  simt::note_shared_read(pointer, sizeof(T));
  return *pointer;
}

template <typename T>
void rr_store_shared(T* pointer, T value) {
  simt::note_shared_write(pointer, sizeof(T));
  *pointer = value;
}

inline void rr_copy_async(void* shared, const void* global, bool present) {
  simt::check_shared(shared, 16);
  simt::Copy copy{static_cast<unsigned char*>(shared), {}};
  simt::check_global(global, 16);
  if (present) std::memcpy(copy.data, global, 16);
  simt::self().pending.push_back(copy);
}

inline void rr_commit_copies() {
  simt::Fiber& fiber = simt::self();
  for (const simt::Copy& copy : fiber.pending) fiber.committed.push_back(copy);
  fiber.pending.clear();
}

inline void rr_wait_for_copies() {
  simt::Fiber& fiber = simt::self();
  for (const simt::Copy& copy : fiber.committed) {
    simt::note_shared_write(copy.to, 16);
    std::memcpy(copy.to, copy.data, 16);
  }
  fiber.committed.clear();
}

inline void rr_load_matrices(u32 (&out)[4], const f16* row) {
  simt::load_matrices(out, row, simt::LOAD);
}

inline void rr_load_matrices_transposed(u32 (&out)[4], const f16* row) {
  simt::load_matrices(out, row, simt::LOAD_TRANSPOSED);
}

inline void rr_multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const float* table = simt::half_table();
  simt::Operands mine;
  for (int i = 0; i < 4; i++) {
    mine.a[2 * i] = table[a[i] & 0xffff];
    mine.a[2 * i + 1] = table[a[i] >> 16];
  }
  mine.b[0] = table[b0 & 0xffff];
  mine.b[1] = table[b0 >> 16];
  mine.b[2] = table[b1 & 0xffff];
  mine.b[3] = table[b1 >> 16];
  const simt::Operands* lanes = simt::exchange(mine, simt::MULTIPLY);
  const int g = simt::self().lane / 4, q = simt::self().lane % 4;
  for (int e = 0; e < 4; e++) {
    const int lower = e / 2, column = 2 * q + e % 2;
    float total = sum[e];
    for (int k = 0; k < 16; k++) {
      const simt::Operands& left = lanes[g * 4 + k % 8 / 2];
      const simt::Operands& right = lanes[column * 4 + k % 8 / 2];
      total += left.a[2 * (lower + 2 * (k / 8)) + k % 2] * right.b[2 * (k / 8) + k % 2];
    }
    sum[e] = total;
  }
}

inline float rr_to_float(f16 bits) { return simt::half_table()[bits]; }
inline f16 rr_to_half(float value) { return simt::float_to_half(value); }
inline u32 rr_pack(float low, float high) {
  return rr_to_half(low) | static_cast<u32>(rr_to_half(high)) << 16;
}
inline float2 rr_unpack(u32 packed) {
  return {rr_to_float(static_cast<f16>(packed & 0xffff)),
          rr_to_float(static_cast<f16>(packed >> 16))};
}
inline u32 rr_multiply_halves(u32 a, u32 b) {
  const float2 x = rr_unpack(a), y = rr_unpack(b);
  return rr_pack(x.x * y.x, x.y * y.y);
}
// A product of halves is exact in float32; the sum may round twice, seldom and by one step.
inline u32 rr_multiply_add_halves(u32 a, u32 b, u32 c) {
  const float2 x = rr_unpack(a), y = rr_unpack(b), z = rr_unpack(c);
  return rr_pack(x.x * y.x + z.x, x.y * y.y + z.y);
}
inline float rr_exp2(float x) { return std::exp2(x); }
inline float rr_reciprocal(float x) { return 1.0f / x; }
inline float rr_exp(float x) { return std::exp(x); }
inline float rr_rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float rr_max(float a, float b) { return std::fmax(a, b); }
inline float rr_negative_infinity() { return -std::numeric_limits<float>::infinity(); }
inline float2 rr_float2(float x, float y) { return {x, y}; }
inline float4 rr_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 rr_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
