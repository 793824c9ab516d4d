// What the kernels ask of the machine, one thin function each.
//
// On a GPU they are PTX instructions (PTX ISA 9.0, sm_80 and later). With RT_RIS_SIMT defined the
// same names come from machine_simt.h, which imitates them lane by lane on the host. Kernels use
// nothing else, and no header, so that nvcc and NVRTC take them alike.
#pragma once

#ifdef RT_RIS_SIMT
#include "machine_simt.h"
#else

typedef unsigned short f16;  // the bits of a half-precision number
typedef unsigned int u32;

#define RR_DEVICE __device__ __forceinline__
#define RR_KERNEL(threads, blocks_per_sm) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
#define RR_PARAMETER(type, name) const __grid_constant__ type name
#define RR_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

RR_DEVICE u32 rr_shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- threads ----
RR_DEVICE void rr_barrier() { __syncthreads(); }

// Orders the shared memory of one warp's lanes.
RR_DEVICE void rr_warp_barrier() { __syncwarp(); }

RR_DEVICE float rr_shuffle_xor(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Lets the next kernel of the stream start, where it was launched as a dependent (sm_90).
RR_DEVICE void rr_release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the memory of the kernel before, where this one was launched as its dependent.
RR_DEVICE void rr_wait_for_prior_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- global memory ----
template <typename T>
RR_DEVICE T rr_load(const T* pointer) {
  return __ldg(pointer);
}

// For what another kernel of the same launch wrote: the read-only path may not be used for it.
template <typename T>
RR_DEVICE T rr_load_coherent(const T* pointer) {
  return *pointer;
}

template <typename T>
RR_DEVICE void rr_store(T* pointer, T value) {
  *pointer = value;
}

// ---- shared memory ----
template <typename T>
RR_DEVICE T rr_load_shared(const T* pointer) {
  return *pointer;
}

template <typename T>
RR_DEVICE void rr_store_shared(T* pointer, T value) {
  *pointer = value;
}

// Copies 16 bytes from global to shared memory, or writes zeros where `present` is false.
RR_DEVICE void rr_copy_async(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(rr_shared_address(shared)),
               "l"(global), "r"(present ? 16 : 0)
               : "memory");
}

RR_DEVICE void rr_commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for the copies this thread has committed; a barrier makes them visible to the others.
RR_DEVICE void rr_wait_for_copies() { asm volatile("cp.async.wait_group 0;\n" ::: "memory"); }

// ---- matrices ----
// Four 8 x 8 matrices of f16; lane i gives the address of row i % 8 of matrix i / 8.
RR_DEVICE void rr_load_matrices(u32 (&out)[4], const f16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(rr_shared_address(row))
               : "memory");
}

RR_DEVICE void rr_load_matrices_transposed(u32 (&out)[4], const f16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(rr_shared_address(row))
               : "memory");
}

// sum[16 x 8] += a[16 x 16] b[16 x 8], products and sum in float32.
RR_DEVICE void rr_multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----
RR_DEVICE u32 rr_pack(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

RR_DEVICE float2 rr_unpack(u32 packed) {
  float2 pair;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(packed));
  return pair;
}

RR_DEVICE float rr_to_float(f16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

RR_DEVICE f16 rr_to_half(float value) {
  f16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two products, and two fused multiply-adds, of halves; each rounds once.
RR_DEVICE u32 rr_multiply_halves(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

RR_DEVICE u32 rr_multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// 2^x to about 2^-22, relative.
RR_DEVICE float rr_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp.
RR_DEVICE float rr_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

RR_DEVICE float rr_exp(float x) { return expf(x); }
RR_DEVICE float rr_rsqrt(float x) { return rsqrtf(x); }
RR_DEVICE float rr_max(float a, float b) { return fmaxf(a, b); }
RR_DEVICE float rr_negative_infinity() { return __int_as_float(0xff800000); }
RR_DEVICE float2 rr_float2(float x, float y) { return make_float2(x, y); }
RR_DEVICE float4 rr_float4(float x, float y, float z, float w) { return make_float4(x, y, z, w); }
RR_DEVICE uint4 rr_uint4(u32 x, u32 y, u32 z, u32 w) { return make_uint4(x, y, z, w); }

#endif
