// The library's entry points other than the searches: versions, choice of instruction set, lifetime of codebooks.
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>
#include <new>

#include "codebook.h"
#include "digest.h"
#include "isa.h"
#include "tokenizers_mm.h"

namespace tmm {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// The system's support of the registers is that of AVX2. Not by name: compilers learned the name late.
bool runs_avx_vnni() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool runs_avx512() { return false; }
bool runs_avx_vnni() { return false; }
bool runs_avx2() { return false; }
#endif

const Isa* find(const char* name) {
  const Isa* all[] = {runs_avx512() ? avx512_isa() : nullptr, runs_avx_vnni() ? avx_vnni_isa() : nullptr,
                      runs_avx2() ? avx2_isa() : nullptr, portable_isa()};
  for (const Isa* isa : all)
    if (isa && (!name || std::strcmp(isa->name, name) == 0)) return isa;
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{find(nullptr)};
  return isa;
}

}  // namespace

const Isa* current_isa() { return current().load(std::memory_order_relaxed); }

}  // namespace tmm

int tmm_abi_version(void) { return TMM_ABI_VERSION; }

const char* tmm_isa(void) { return tmm::current_isa()->name; }

int tmm_select_isa(const char* name) {
  const tmm::Isa* isa = tmm::find(name);
  if (!isa) return TMM_BAD_ARGUMENT;
  tmm::current() = isa;
  return TMM_OK;
}

tmm_codebook* tmm_codebook_create(int64_t k, int64_t d, int dtype, int method) {
  const bool tree_fits = (method != TMM_TREE || (dtype == TMM_F32 && d <= tmm::kMaxTreeDim)) &&
                         (method != TMM_DIFFERENCE || dtype == TMM_F32);
  const tmm::Isa* isa = tmm::current_isa();
  const bool rung_fits = (method != TMM_INT8 || isa->has[tmm::kInt8]) && (method != TMM_INT16 || isa->has[tmm::kInt16]);
  if (k < 1 || d < 1 || k > 0x7fffff00 || dtype < TMM_F32 || dtype > TMM_F64 || method < TMM_AUTO || method > TMM_BRUTE ||
      !tree_fits || !rung_fits)
    return nullptr;
  return reinterpret_cast<tmm_codebook*>(new (std::nothrow) tmm::Codebook(k, d, dtype, method, isa));
}

void tmm_codebook_destroy(tmm_codebook* codebook) { delete reinterpret_cast<tmm::Codebook*>(codebook); }

int64_t tmm_codebook_bytes(const tmm_codebook* codebook) { return reinterpret_cast<const tmm::Codebook*>(codebook)->bytes(); }

int tmm_codebook_method(const tmm_codebook* codebook) {
  return reinterpret_cast<const tmm::Codebook*>(codebook)->last_method.load(std::memory_order_relaxed);
}

int tmm_digest(const void* data, int64_t rows, int64_t bytes, int64_t stride, uint64_t* digest, int threads) {
  if (rows < 0 || bytes < 0 || threads < 1) return TMM_BAD_ARGUMENT;
  tmm::digest_rows({static_cast<const char*>(data), rows, bytes, stride}, digest, threads);
  return TMM_OK;
}
