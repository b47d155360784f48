// The library's entry points other than the searches: versions, choice of instruction set, lifetime of codebooks.
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
// The system's support of the registers is that of AVX2. Not by name: compilers learned the name late.
bool runs_avx_vnni() {
  unsigned a, b, c, d;
  return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
// By its bits, as AVX-VNNI: tiles, and their products of bytes.
bool runs_amx() {
  unsigned a, b, c, d;
  return runs_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
}
#elif defined(__aarch64__) && defined(__linux__)
// The bits of the kernel's interface, which older headers do not name.
bool runs_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool runs_i8mm() { return getauxval(26) >> 13 & 1; }  // AT_HWCAP2
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool runs_dot() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool runs_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool runs_dot() { return false; }
bool runs_i8mm() { return false; }
#endif

// The strongest instruction set, or the one of that name, of those that this CPU has.
const Isa* find(const char* name) {
#if defined(__x86_64__) || defined(__i386__)
  const Isa* all[] = {runs_amx() ? avx512_amx_isa() : nullptr, runs_avx512() ? avx512_isa() : nullptr, runs_avx_vnni() ? avx_vnni_isa() : nullptr,
                      runs_avx2() ? avx2_isa() : nullptr, portable_isa()};
#elif defined(__aarch64__)
  const Isa* all[] = {runs_i8mm() ? neon_i8mm_isa() : nullptr, runs_dot() ? neon_dot_isa() : nullptr, neon_isa(), portable_isa()};
#else
  const Isa* all[] = {portable_isa()};
#endif
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
