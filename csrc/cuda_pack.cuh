// Packing: the shift, the scales, the fp16 matrices with their extra columns, and the bound of every row
// (cuda_shared.h).
#pragma once

#include "cuda_machine.cuh"
#include "cuda_shared.h"

namespace tmm {

constexpr int kPackThreads = 256;
constexpr int kWarps = kPackThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The same bits in every lane, in a fixed order.
__device__ __forceinline__ double warp_sum(double value) {
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// sums[slab, col] over the finite values of the slab's codes; 32 columns x 8 rows of threads.
__global__ void __launch_bounds__(kPackThreads) slab_sums(Points codes, int64_t num_codes, int slabs, double* sums) {
  __shared__ double partial[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = blockIdx.x * 32 + lane;
  const int64_t begin = num_codes * blockIdx.y / slabs, end = num_codes * (blockIdx.y + 1) / slabs;
  double sum = 0.0;
  if (col < codes.dim) {
    for (int64_t code = begin + warp; code < end; code += kWarps) {
      const double value = codes.value(code, col);
      if (isfinite(value)) sum += value;
    }
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < codes.dim) {
    for (int other = 1; other < kWarps; ++other) sum += partial[other][lane];
    sums[static_cast<int64_t>(blockIdx.y) * codes.dim + col] = sum;
  }
}

// The shift. Any value is right; the mean of the finite values makes the bound tight.
__global__ void __launch_bounds__(kPackThreads) mean_of_slabs(const double* sums, int slabs, int dim, int64_t num_codes,
                                                              double* mean) {
  __shared__ double partial[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = blockIdx.x * 32 + lane;
  double sum = 0.0;
  if (col < dim) {
    for (int slab = warp; slab < slabs; slab += kWarps) sum += sums[static_cast<int64_t>(slab) * dim + col];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < dim) {
    for (int other = 1; other < kWarps; ++other) sum += partial[other][lane];
    const double value = sum / static_cast<double>(num_codes);
    mean[col] = isfinite(value) ? value : 0.0;
  }
}

// ||x||^2 of a shifted row by one warp; `finite` tells whether all its values are.
__device__ __forceinline__ double warp_squared_norm(const Points& points, int64_t row, const double* mean,
                                                    bool& finite) {
  const int lane = threadIdx.x % 32;
  double sum = 0.0;
  bool good = true;
  for (int col = lane; col < points.dim; col += 32) {
    good = good && isfinite(points.value(row, col));
    const double shifted = points.shifted(row, col, mean[col]);
    sum = fma(shifted, shifted, sum);
  }
  finite = __all_sync(kAllLanes, good);
  return warp_sum(sum);
}

// The sum over the codes of a warp's stride of the hash of their values, in every lane.
__device__ __forceinline__ uint64_t warp_hash(const Points& codes, int64_t num_codes) {
  uint64_t hash = 0;
  for (int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; code < num_codes;
       code += static_cast<int64_t>(gridDim.x) * kWarps) {
    for (int col = threadIdx.x % 32; col < codes.dim; col += 32) {
      hash += hash_value(codes.value(code, col), static_cast<uint64_t>(code) * codes.dim + col);
    }
  }
  for (int step = 16; step > 0; step >>= 1) {
    hash += __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(hash), step);
  }
  return hash;
}

__global__ void __launch_bounds__(kPackThreads) hash_codes(Points codes, int64_t num_codes, uint64_t* total) {
  const uint64_t hash = warp_hash(codes, num_codes);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), hash);
}

// The largest and the smallest norm, and the hash.
__global__ void __launch_bounds__(kPackThreads) code_norms(Points codes, int64_t num_codes, const double* mean,
                                                           CodeHeader* header) {
  __shared__ double largest[kWarps], smallest[kWarps];
  __shared__ int overflow;
  const uint64_t hash = warp_hash(codes, num_codes);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(&header->hash), hash);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) overflow = 0;
  __syncthreads();
  double most = 0.0, least = INFINITY;
  for (int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + warp; code < num_codes;
       code += static_cast<int64_t>(gridDim.x) * kWarps) {
    bool finite;
    const double norm = warp_squared_norm(codes, code, mean, finite);
    if (finite && norm < INFINITY) {
      most = fmax(most, norm);
      least = fmin(least, norm);
    }
    if (finite && !(norm < INFINITY) && lane == 0) overflow = 1;
  }
  if (lane == 0) {
    largest[warp] = most;
    smallest[warp] = least;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kWarps; ++other) {
      most = fmax(most, largest[other]);
      least = fmin(least, smallest[other]);
    }
    atomicMax(reinterpret_cast<unsigned long long*>(&header->largest_norm), double_bits(most));
    atomicMax(reinterpret_cast<unsigned long long*>(&header->smallest_norm), ~double_bits(least));
    if (overflow) atomicMax(&header->overflow, 1u);
  }
}

// Quantises one shifted row times 2^exponent; returns ||x^||^2 and ||dX||^2 of the scaled row.
__device__ __forceinline__ void warp_quantise(const Points& points, int64_t row, const double* mean, int exponent,
                                              uint16_t* out, double& quantised, double& residual) {
  const int lane = threadIdx.x % 32;
  double kept = 0.0, lost = 0.0;
  for (int col = lane; col < points.dim; col += 32) {
    const double exact = ldexp(points.shifted(row, col, mean[col]), exponent);
    const uint16_t half = half_nearest(exact);
    const double value = half_value(half), rest = exact - value;
    out[col] = half;
    kept = fma(value, value, kept);
    lost = fma(rest, rest, lost);
  }
  quantised = warp_sum(kept);
  residual = warp_sum(lost);
}

__device__ __forceinline__ void warp_zero(uint16_t* out, int begin, int end) {
  for (int col = begin + threadIdx.x % 32; col < end; col += 32) out[col] = 0;
}

__global__ void __launch_bounds__(kPackThreads) pack_codes(Points codes, int64_t num_codes, int64_t padded_codes,
                                                           int width, const double* mean, const CodeHeader* header,
                                                           uint16_t* packed) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int exponent = code_exponent(bits_double(header->largest_norm));
  for (int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + warp; code < padded_codes;
       code += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t place = code / kSpan * kSpan + span_column(static_cast<int>(code % kSpan));
    uint16_t* out = packed + place * width;
    bool finite = code < num_codes;
    const double norm = finite ? ldexp(warp_squared_norm(codes, code, mean, finite), 2 * exponent) : 0.0;
    if (!finite) {  // never chosen
      warp_zero(out, 0, width);
      continue;
    }
    double quantised, residual;
    warp_quantise(codes, code, mean, exponent, out, quantised, residual);
    warp_zero(out, codes.dim + kExtra, width);
    if (lane == 0) code_columns(norm, residual, width, out + codes.dim);
  }
}

// Rows first .. first + num_rows - 1 of the tokens become rows 0 .. of the chunk.
__global__ void __launch_bounds__(kPackThreads) pack_rows(Points tokens, int64_t first, int num_rows, int width,
                                                          const double* mean, const CodeHeader* header,
                                                          uint16_t* packed, RowBound* bounds) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= num_rows) return;
  uint16_t* out = packed + static_cast<int64_t>(row) * width;
  bool finite;
  const double norm = warp_squared_norm(tokens, first + row, mean, finite);
  if (!finite) {
    warp_zero(out, 0, width);
    if (lane == 0) {
      RowBound bound = {};
      bound.status = kNotFinite;
      bounds[row] = bound;
    }
    return;
  }
  const CodeHeader codes = *header;
  const int code_exp = code_exponent(bits_double(codes.largest_norm));
  const int row_exp = row_exponent(norm, code_exp);
  double quantised, residual;
  warp_quantise(tokens, first + row, mean, row_exp, out, quantised, residual);
  warp_zero(out, tokens.dim + kExtra, width);
  if (lane == 0) {
    bounds[row] = row_columns(norm, quantised, residual, row_exp, code_exp, codes, tokens.dim, width, out + tokens.dim);
  }
}

// In place of pack_rows when every code is scored in double precision: only tells which tokens are finite.
__global__ void __launch_bounds__(kPackThreads) check_rows(Points tokens, int64_t first, int num_rows,
                                                           RowBound* bounds) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= num_rows) return;
  bool good = true;
  for (int col = threadIdx.x % 32; col < tokens.dim; col += 32) good = good && isfinite(tokens.value(first + row, col));
  good = __all_sync(kAllLanes, good);
  if (threadIdx.x % 32 == 0) {
    RowBound bound = {};
    bound.status = good ? kExact : kNotFinite;
    bounds[row] = bound;
  }
}

}  // namespace tmm
