// A model of the machine behind csrc/cuda_machine.cuh, so that csrc/cuda_nearest.cu runs on the host, kernels and
// all. Blocks run one after another; the threads of a block are fibers that change at barriers, shuffles and matrix
// instructions. Asynchronous work is done as late as its rules allow (copies when they are waited for, products when
// their group is), so a missing wait or a stage handed back too early shows as a wrong answer, and a wait that
// nothing ends as a deadlock.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) alignas(n)
#define TMM_MACHINE_HAS_WGMMA 1

using std::isfinite;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y;
  dim3(unsigned x_, unsigned y_ = 1) : x(x_), y(y_) {}
};
struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- the runtime --------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum CUresult { CUDA_SUCCESS };
enum { cudaEnableDefault, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum { CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using cudaStream_t = void*;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
#define CUDART_VERSION 13000

struct CUtensorMap {
  const uint16_t* data;
  uint64_t cols, rows, stride;
  uint32_t box_cols, box_rows;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int, uint32_t, void* data, const uint64_t* sizes,
                                       const uint64_t* strides, const uint32_t* box, const uint32_t*, int, int, int,
                                       int) {
  *map = {static_cast<const uint16_t*>(data), sizes[0], sizes[1], strides[0], box[0], box[1]};
  return CUDA_SUCCESS;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, int, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrComputeCapabilityMinor ? 0 : 3;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  std::memset(to, value, size);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

// ---- fibers -------------------------------------------------------------------------------------------------------

struct Index {
  unsigned x, y;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace machine {

struct Meeting {  // of the lanes of a warp, a warpgroup or a block
  int members = 0, arrived = 0, turn = 0;
  uint64_t slots[2][32];
};

struct Barrier {
  int expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};

struct Copy {  // by one thread: 16 bytes, zeros where from is null
  uint32_t to;
  const void* from;
};

struct Product {
  float (*acc)[128];
  uint64_t rows, codes;
  int add;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::vector<Product> products;
};

inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline unsigned current;
inline std::vector<Meeting> warps, warpgroups;
inline Meeting block;
inline std::vector<unsigned char> shared;
inline std::map<uint32_t, Barrier> barriers;
inline std::deque<std::function<void()>> transfers;
inline std::function<void()> body;
inline long idle;
constexpr uint32_t kSharedAt = 0x150;  // dynamic shared memory does not start on the swizzle's pattern

inline void fail(const char* what) {
  std::fprintf(stderr, "machine: %s in thread %u of block %u\n", what, threadIdx.x, blockIdx.x);
  std::abort();
}

inline void yield() {
  if (++idle > 50'000'000) fail("deadlock");
  swapcontext(&fibers[current]->context, &scheduler);
}

inline void meet(Meeting& meeting) {
  const int turn = meeting.turn;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.turn;
    idle = 0;
  } else {
    while (meeting.turn == turn) yield();
  }
}

template <class T>
const uint64_t* gather(T value) {  // the value of every lane
  Meeting& warp = warps[threadIdx.x / 32];
  uint64_t* slots = warp.slots[warp.turn % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  slots[threadIdx.x % 32] = bits;
  meet(warp);
  return slots;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void start() {
  body();
  fibers[current]->done = true;
  swapcontext(&fibers[current]->context, &scheduler);
}

inline unsigned char* at(uint32_t address, size_t size) {
  if (address + size > shared.size()) fail("address beyond shared memory");
  return &shared[address];
}

inline void run_block(int threads, int shared_bytes) {
  shared.assign(kSharedAt + shared_bytes, 0xff);  // NaN until written
  barriers.clear();
  transfers.clear();
  warps.assign((threads + 31) / 32, {});
  for (Meeting& warp : warps) warp.members = 32;
  warpgroups.assign((threads + 127) / 128, {});
  for (Meeting& group : warpgroups) group.members = 128;
  block = {};
  block.members = threads;
  idle = 0;
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.resize(1 << 16);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.products.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  bool backwards = false;
  for (int left = threads; left > 0; backwards = !backwards) {
    left = 0;
    for (int step = 0; step < threads; ++step) {
      const int i = backwards ? threads - 1 - step : step;
      if (fibers[i]->done) continue;
      current = i;
      threadIdx = {static_cast<unsigned>(i), 0};
      swapcontext(&scheduler, &fibers[i]->context);
      left += !fibers[i]->done;
    }
  }
}

}  // namespace machine

inline void __syncthreads() { machine::meet(machine::block); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return machine::from_bits<T>(machine::gather(value)[lane]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return machine::from_bits<T>(machine::gather(value)[threadIdx.x % 32 ^ mask]);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* slots = machine::gather(value);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(slots[lane] & 1) << lane;
  return votes;
}
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == 0xffffffffu; }
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <class T, class V>
T atomicMax(T* to, V value) {
  const T old = *to;
  if (static_cast<T>(value) > old) *to = static_cast<T>(value);
  return old;
}
template <class T, class V>
T atomicAdd(T* to, V value) {
  const T old = *to;
  *to += value;
  return old;
}

// ---- the instructions of cuda_machine.cuh -------------------------------------------------------------------------

namespace tmm {

inline float machine_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(mantissa, -24)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(half & 0x8000 ? -value : value);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  gridDim = {blocks.x, blocks.y};
  blockDim = {static_cast<unsigned>(threads), 1};
  machine::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = {x, y};
      machine::run_block(threads, shared_bytes);
    }
  }
  return cudaSuccess;
}

inline uint32_t shared_memory() { return machine::kSharedAt; }

inline int max3(int a, int b, int c) { return std::max(std::max(a, b), c); }

inline void copy16(uint32_t to, const void* from, bool inside) {
  machine::fibers[machine::current]->open.push_back({to, inside ? from : nullptr});
}

inline void copy_commit() {
  machine::Fiber& fiber = *machine::fibers[machine::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int pending>
void copy_wait() {
  machine::Fiber& fiber = *machine::fibers[machine::current];
  while (fiber.groups.size() > pending) {
    for (const machine::Copy& copy : fiber.groups.front()) {
      unsigned char* to = machine::at(copy.to, 16);
      if (copy.from) {
        std::memcpy(to, copy.from, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
    fiber.groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&out)[4], uint32_t from) {
  uint32_t rows[32];
  const uint64_t* slots = machine::gather(from);
  for (int lane = 0; lane < 32; ++lane) rows[lane] = static_cast<uint32_t>(slots[lane]);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) std::memcpy(&out[i], machine::at(rows[8 * i + lane / 4] + lane % 4 * 4, 4), 4);
}

inline void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  float left[2][16], right[2][16];  // rows group, group + 8 of a; rows 2 place, 2 place + 1 of b
  for (int i = 0; i < 4; ++i) {
    const uint64_t* slots = machine::gather(a[i]);
    for (int t = 0; t < 4; ++t) {
      for (int p = 0; p < 2; ++p) {
        left[i % 2][i / 2 * 8 + t * 2 + p] = machine_half(static_cast<uint16_t>(slots[group * 4 + t] >> (16 * p)));
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const uint64_t* slots = machine::gather(i ? b1 : b0);
    for (int row = 0; row < 2; ++row) {
      for (int t = 0; t < 4; ++t) {
        for (int p = 0; p < 2; ++p) {
          const uint64_t pair = slots[(place * 2 + row) * 4 + t];
          right[row][i * 8 + t * 2 + p] = machine_half(static_cast<uint16_t>(pair >> (16 * p)));
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) acc[i] += left[i / 2][k] * right[i % 2][k];
  }
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  machine::at(barrier, 8);
  if (barrier % 8) machine::fail("misaligned barrier");
  machine::barriers[barrier] = {arrivals, arrivals, 0, 0};
}

inline void barrier_init_fence() {}

inline void barrier_settle(machine::Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    barrier.phase ^= 1;
    machine::idle = 0;
  }
}

inline void barrier_arrive(uint32_t barrier) {
  machine::Barrier& state = machine::barriers.at(barrier);
  if (--state.pending < 0) machine::fail("too many arrivals");
  barrier_settle(state);
}

inline void barrier_expect(uint32_t barrier, int bytes) {
  machine::barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, int parity) {
  while (machine::barriers.at(barrier).phase == parity) {
    if (!machine::transfers.empty()) {
      const auto transfer = std::move(machine::transfers.front());
      machine::transfers.pop_front();
      transfer();
    } else {
      machine::yield();
    }
  }
}

// Bits 4-6 of an address are turned by bits 7-9: the 128-byte swizzle.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy_tile(uint32_t to, const CUtensorMap& map, int col, int row, uint32_t barrier) {
  if (to % 1024) machine::fail("tile off the swizzle's pattern");
  machine::transfers.push_back([=] {
    for (uint32_t r = 0; r < map.box_rows; ++r) {
      for (uint32_t c = 0; c < map.box_cols; ++c) {
        const uint64_t from_row = row + r, from_col = col + c;
        const bool inside = from_row < map.rows && from_col < map.cols;
        const uint16_t value = inside ? map.data[from_row * (map.stride / 2) + from_col] : 0;
        std::memcpy(machine::at(swizzle(to + r * 128 + c * 2), 2), &value, 2);
      }
    }
    machine::Barrier& state = machine::barriers.at(barrier);
    state.bytes -= map.box_rows * map.box_cols * 2;
    barrier_settle(state);
  });
}

inline void wgmma_begin() { machine::meet(machine::warpgroups[threadIdx.x / 128]); }

inline void wgmma(float (&acc)[128], uint64_t rows, uint64_t codes, int add) {
  machine::fibers[machine::current]->products.push_back({&acc, rows, codes, add});
}

inline void machine_operand(float (&out)[16], uint64_t descriptor, int row) {
  if (descriptor >> 62 != 1) machine::fail("not the 128-byte swizzle");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  for (int k = 0; k < 16; ++k) {
    uint16_t half;
    std::memcpy(&half, machine::at(swizzle(start + row / 8 * group + row % 8 * 128 + k * 2), 2), 2);
    out[k] = machine_half(half);
  }
}

inline void wgmma_end(float (&)[128]) {
  machine::Meeting& warpgroup = machine::warpgroups[threadIdx.x / 128];
  machine::meet(warpgroup);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (const machine::Product& product : machine::fibers[machine::current]->products) {
    float left[2][16], right[16];
    machine_operand(left[0], product.rows, warp * 16 + lane / 4);
    machine_operand(left[1], product.rows, warp * 16 + lane / 4 + 8);
    for (int j = 0; j < 32; ++j) {
      for (int p = 0; p < 2; ++p) {
        machine_operand(right, product.codes, 8 * j + lane % 4 * 2 + p);
        for (int half = 0; half < 2; ++half) {
          float& value = (*product.acc)[4 * j + 2 * half + p];
          if (!product.add) value = 0.0f;
          for (int k = 0; k < 16; ++k) value += left[half][k] * right[k];
        }
      }
    }
  }
  machine::fibers[machine::current]->products.clear();
  machine::yield();  // let others run ahead before this stage is handed back
}

template <int count>
void registers_release() {}

template <int count>
void registers_claim() {}

}  // namespace tmm
