// The per-row work of the kl family, one level's worth: what kl.cpp and topk_kl.cpp drive and kl_rows.cpp implements.
//
// A row is cut into blocks of kBlock classes; a short row is one block, and several of them are worked on together.
// `stats` reads a block of student and teacher once from memory and leaves, relative to the block's own maxima, sums and
// up to three numbers an element; `grad` turns those into the gradient without another exponential. Blocks are
// independent, so a long row can be shared by threads, and are merged in order (merge.h), so the result does not depend
// on how many threads there were.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace kdfast {

constexpr int64_t kBlock = 2048;  // two inputs and two scratch rows of a block: 32 KiB, two thirds of a 48 KiB L1
constexpr int64_t kMostRows = 8;  // rows of one block that are worked on together: more gain nothing

inline int64_t num_blocks(int64_t classes) { return classes == 0 ? 1 : (classes + kBlock - 1) / kBlock; }

enum class Storage : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
constexpr int kStorages = 4;

// What `stats` sums and keeps in scratch. With x = (logit - block maximum) * inverse and e = exp(x):
enum class Form : int {
  forward = 0,       // keeps e_s, e_t
  forward_hard = 1,  // keeps e_s, e_t and exp(s - maximum): cross-entropy at T = 1 on the same read
  standardized = 2,  // keeps e_s, e_t; also sums what the gradient through the standard deviation needs
  reverse = 3,       // keeps e_s, x_s - x_t
  js = 4,            // keeps e_s, e_t, x_s - x_t; `mix` makes p_s and the log of its share of the mixture from them
  student = 5,       // keeps e_s; the teacher is not read
};
constexpr int kForms = 6;

struct BlockStats {
  double max_student, max_teacher;  // in logits; 0 where the whole block is -inf
  double sum_student, sum_teacher;  // sum e
  double cross;                     // forward: sum e_t (x_t - x_s); reverse: sum e_s (x_s - x_t)
  double sum_hard, sum_logits;      // forward_hard: sum exp(s - maximum), sum s
  double student_x, teacher_x;      // standardized: sum e_s x_s, sum e_t x_s
};

struct Block {
  const void *student, *teacher;            // its first class
  void* grad;                               // or null
  int64_t begin, length;                    // classes of the row
  double inverse_student, inverse_teacher;  // 1 / T, or 1 / (T std) where logits are standardized
  const int64_t* holes;                     // those of its classes to leave out, as if their logits were -inf
  int64_t num_holes;
  // Scratch, null where not kept: `length` numbers each, in float (float64 storage: double), of which whole vectors are
  // read and written.
  void *a, *b, *c;
};

// How `grad` reads scratch; coefficients are per block.
enum class Shape : int {
  one = 0,           // k a
  difference = 1,    // k a - l b
  hard = 2,          // k a - l b + m c + n
  standardized = 3,  // k a - l b + m s + n, with the student's logit s
  product = 4,       // k a (b - l); 0 where k a is 0
};
constexpr int kShapes = 5;

struct Coefficients {
  double k, l, m, n;
};

struct Moments {
  double count, mean, squares;  // squares: sum (x - mean)^2
};

struct MixSums {
  double student, teacher;  // sum p_s log(p_s / m), sum p_t log(p_t / m)
};

// All work on blocks [first, last).
struct KlKernels {
  using Stats = void (*)(const Block*, int64_t first, int64_t last, BlockStats*);
  // `streamed`: by stores that pass by the caches.
  using Grad = void (*)(const Block*, int64_t first, int64_t last, const Coefficients*, bool streamed);
  using FindMoments = void (*)(const Block*, int64_t first, int64_t last, Moments* student, Moments* teacher);
  // p_s = k a, p_t = l b, m = beta p_t + (1 - beta) p_s; leaves a = p_s, b = log(p_s / m).
  using Mix = void (*)(const Block*, int64_t first, int64_t last, double beta, const Coefficients*, MixSums*);
  Stats stats[kForms][kStorages];
  Grad grad[kShapes][kStorages];
  FindMoments moments[kStorages];
  Mix mix[kStorages];
};

KDFAST_DECLARE_LEVELS(KlKernels, kl_kernels)

}  // namespace kdfast
