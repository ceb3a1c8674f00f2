#include "tile_gemm.h"

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <exception>

namespace lightkit::cpu::linear_cross_entropy {
namespace {

namespace blas = at::native::cpublas;

// Returns true if oneDNN's micro-kernels take this type here. It computes a product whose result is known; the odd
// number of columns and a k beyond a vector reveal an unexpected layout.
template <typename T>
bool micro_kernel_works() {
  constexpr int64_t m = 3, n = 5, k = 34;
  constexpr bool paired = sizeof(T) == 2;
  std::array<T, m * k> a;
  std::array<T, k * n> b;
  std::array<float, m * n> c{}, expected{};
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const auto left = static_cast<float>((i + 2 * p) % 7 - 3), right = static_cast<float>((3 * p + j) % 5 - 2);
        a[i * k + p] = static_cast<T>(left);
        b[paired ? (p / 2 * n + j) * 2 + p % 2 : p * n + j] = static_cast<T>(right);
        expected[i * n + j] += left * right;
      }
    }
  }
  try {
    blas::brgemm(m, n, k, k, n, n, /*add_C=*/false, a.data(), b.data(), c.data(), paired);
    blas::brgemm_release(paired);
  } catch (const std::exception&) {
    // torch refuses with a c10::Error. Where torch's check admits the processor, oneDNN may refuse with an error of its
    // own, which has no other base: for bfloat16 on a processor with AVX-512 and without AVX512_BF16.
    return false;
  }
  return c == expected;
}

bool has_float_gemm() {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  static const bool works = micro_kernel_works<float>();
  return works;
#else
  return false;
#endif
}

// The product without a micro-kernel: a block of C stays in registers while A and B are read.
template <typename T>
class VectorGemm {
  using Vec = at::vec::Vectorized<T>;
  // Derived: 8 * 3 sums, 3 vectors of B and a value of A fit 32 registers; 6 * 2, 2 and 1 fit 16.
  static constexpr int kVectors = Vec::size() * sizeof(T) == 64 ? 3 : 2;
  static constexpr int kRows = Vec::size() * sizeof(T) == 64 ? 8 : 6;

 public:
  int64_t m, n, k;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  T* c;
  int64_t ldc;
  bool accumulate;

  void run() const {
    for (int64_t j = 0; j < n; j += kVectors * Vec::size()) {
      for (int64_t i = 0; i < m; i += kRows) {
        rows<kRows>(i, j);
      }
    }
  }

 private:
  template <int count>
  void rows(int64_t i, int64_t j) const {
    if constexpr (count > 1) {
      if (m - i < count) {
        return rows<count - 1>(i, j);
      }
    }
    if (n - j >= kVectors * Vec::size()) {
      block<count, kVectors>(i, j, Vec::size());
      return;
    }
    for (; j < n; j += Vec::size()) {
      block<count, 1>(i, j, std::min<int64_t>(Vec::size(), n - j));
    }
  }

  // `lanes` of the last vector are used.
  template <int count, int vectors>
  void block(int64_t i, int64_t j, int64_t lanes) const {
    const auto lanes_of = [&](int v) { return v == vectors - 1 ? lanes : Vec::size(); };
    Vec sum[count][vectors];
    for (int r = 0; r < count; ++r) {
      for (int v = 0; v < vectors; ++v) {
        T* place = c + (i + r) * ldc + j + v * Vec::size();
        sum[r][v] = accumulate ? Vec::loadu(place, lanes_of(v)) : Vec(T(0));
      }
    }
    for (int64_t p = 0; p < k; ++p) {
      Vec right[vectors];
      for (int v = 0; v < vectors; ++v) {
        right[v] = Vec::loadu(b + p * ldb + j + v * Vec::size(), lanes_of(v));
      }
      for (int r = 0; r < count; ++r) {
        const Vec left(a[(i + r) * lda + p]);
        for (int v = 0; v < vectors; ++v) {
          sum[r][v] = at::vec::fmadd(left, right[v], sum[r][v]);
        }
      }
    }
    for (int r = 0; r < count; ++r) {
      for (int v = 0; v < vectors; ++v) {
        sum[r][v].store(c + (i + r) * ldc + j + v * Vec::size(), static_cast<int>(lanes_of(v)));
      }
    }
  }
};

}  // namespace

bool has_bfloat16_gemm() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  static const bool works = micro_kernel_works<at::BFloat16>();
  return works;
#else
  return false;
#endif
}

void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const float* a,
    int64_t lda,
    const float* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (has_float_gemm()) {
    blas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
    return;
  }
#endif
  VectorGemm<float>{m, n, k, a, lda, b, ldb, c, ldc, accumulate}.run();
}

void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const double* a,
    int64_t lda,
    const double* b,
    int64_t ldb,
    double* c,
    int64_t ldc,
    bool accumulate) {
  VectorGemm<double>{m, n, k, a, lda, b, ldb, c, ldc, accumulate}.run();
}

void tile_gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    const at::BFloat16* b,
    int64_t ldb,
    float* c,
    int64_t ldc,
    bool accumulate) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  blas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/true);
#else
  TORCH_INTERNAL_ASSERT(false, "this torch multiplies no bfloat16 tiles");
#endif
}

void end_tile_gemm() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  blas::brgemm_release(/*is_vnni=*/true);
#endif
}

}  // namespace lightkit::cpu::linear_cross_entropy
