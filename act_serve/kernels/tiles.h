// Products of a bfloat16 ability's rows with many tokens, by the matrix unit of a CPU that has one (Intel AMX).
//
// A tile of 16 rows is multiplied with a panel of 16 tokens, 32 features at a time. Rows are read where they lie; the
// tokens' features are transposed into a panel first, in pairs, as the unit wants its second operand.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace tiles {

constexpr int kSide = 16;          // rows of a tile; tokens of a panel
constexpr int kFeatures = 32;      // features of a tile's row: 64 bytes
constexpr int kBlock = 2 * kSide;  // rows, and tokens, that are multiplied at once

// Linux lets a process use the tiles after it has asked once (arch/x86/include/uapi/asm/prctl.h).
inline bool allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool yes = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return yes;
}

// Before the unit reads it: GCC's intrinsics do not tell the compiler that they do, or not of the whole of it.
inline void written(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// All eight tiles whole: 0 to 3 sums, 4 and 5 rows, 6 and 7 tokens. What was set up before comes back at the end;
// oneDNN remembers what it set up and does not do it again.
class Setup {
 public:
  Setup() {
    alignas(64) uint8_t mine[64] = {1};  // palette 1; bytes of a row from 16 on, rows from 48 on
    for (int tile = 0; tile < 8; tile++) mine[16 + 2 * tile] = 64, mine[48 + tile] = kSide;
    written(mine);
    _tile_storeconfig(before_);
    _tile_loadconfig(mine);
  }
  ~Setup() { _tile_loadconfig(before_); }
  Setup(const Setup&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

inline void transpose(__m512i row[kSide]) {  // 16 x 16 values of 32 bits
  __m512i pairs[kSide], fours[kSide], eights[kSide];
  for (int i = 0; i < kSide; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4)
    for (int half = 0; half < 2; half++) {
      fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
      fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
    }
  for (int i = 0; i < kSide; i += 8)
    for (int column = 0; column < 4; column++) {
      eights[i + column] = _mm512_shuffle_i32x4(fours[i + column], fours[i + column + 4], 0x88);
      eights[i + column + 4] = _mm512_shuffle_i32x4(fours[i + column], fours[i + column + 4], 0xdd);
    }
  for (int column = 0; column < 8; column++) {
    row[column] = _mm512_shuffle_i32x4(eights[column], eights[column + 8], 0x88);
    row[column + 8] = _mm512_shuffle_i32x4(eights[column], eights[column + 8], 0xdd);
  }
}

inline __mmask32 first(int64_t n) { return n >= kFeatures ? ~0u : (1u << n) - 1; }

// The features of up to 16 tokens, transposed: [features / 32][16 pairs of features][16 tokens]; what is missing is 0.
class Panel {
 public:
  // `at(i)` is where the features of the i-th token begin.
  template <class At>
  void fill(At at, int64_t tokens, int64_t features) {
    int64_t blocks = (features + kFeatures - 1) / kFeatures;
    if (int64_t(memory_.size()) < blocks * kSide * kFeatures) memory_.resize(blocks * kSide * kFeatures);
    for (int64_t block = 0; block < blocks; block++) {
      __m512i row[kSide];
      int64_t start = block * kFeatures;
      for (int64_t i = 0; i < kSide; i++)
        row[i] = i < tokens ? _mm512_maskz_loadu_epi16(first(features - start), at(i) + start) : _mm512_setzero_si512();
      transpose(row);
      for (int i = 0; i < kSide; i++) _mm512_storeu_si512(memory_.data() + (block * kSide + i) * kFeatures, row[i]);
    }
    written(memory_.data());
  }
  const uint16_t* block(int64_t number) const { return memory_.data() + number * kSide * kFeatures; }

 private:
  std::vector<uint16_t> memory_;
};

// out[token][row] of R tiles of rows and C panels.
template <int R, int C>
void multiply(const uint16_t* rows, int64_t features, const Panel* panels, float out[kBlock][kBlock]) {
  alignas(64) uint16_t rest[R * kSide * kFeatures];
  _tile_zero(0);
  if constexpr (C > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && C > 1) _tile_zero(3);
  auto step = [&](const uint16_t* here, int64_t stride, int64_t block) {
    _tile_loadd(6, panels[0].block(block), 64);
    _tile_loadd(4, here, stride * sizeof(uint16_t));
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, panels[1].block(block), 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, here + kSide * stride, stride * sizeof(uint16_t));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
  };
  int64_t whole = features / kFeatures;
  for (int64_t block = 0; block < whole; block++) step(rows + block * kFeatures, features, block);
  if (features % kFeatures) {  // a tile is read whole, and behind the last row is other memory
    for (int64_t r = 0; r < R * kSide; r++) {
      const uint16_t* from = rows + r * features + whole * kFeatures;
      _mm512_store_si512(rest + r * kFeatures, _mm512_maskz_loadu_epi16(first(features % kFeatures), from));
    }
    written(rest);
    step(rest, kFeatures, whole);
  }
  alignas(64) __m512i sums[kSide];
  auto take = [&](int r, int c) {
    transpose(sums);
    for (int i = 0; i < kSide; i++) _mm512_storeu_si512(&out[c * kSide + i][r * kSide], sums[i]);
  };
  _tile_stored(0, sums, 64);
  take(0, 0);
  if constexpr (C > 1) {
    _tile_stored(1, sums, 64);
    take(0, 1);
  }
  if constexpr (R > 1) {
    _tile_stored(2, sums, 64);
    take(1, 0);
  }
  if constexpr (R > 1 && C > 1) {
    _tile_stored(3, sums, 64);
    take(1, 1);
  }
}

// y[rows[r]] += weight * (values[r] + bias[r]) for rows `skip` to `end` of 16; rounded once. No bias is null.
inline void scatter(const int32_t* rows, const float* values, const uint16_t* bias, float weight, int skip, int end,
                    uint16_t* y) {
  auto wide = [](const void* halves) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)halves)), 16);
  };
  __m512 value = _mm512_loadu_ps(values);
  if (bias) value = _mm512_add_ps(value, wide(bias));
  auto add = [&](int from, int to) __attribute__((always_inline)) {
    alignas(64) uint16_t held[kSide] = {};
    for (int r = from; r < to; r++) held[r] = y[rows[r]];
    __m512 sum = _mm512_add_ps(wide(held), _mm512_mul_ps(_mm512_set1_ps(weight), value));
    _mm256_store_si256((__m256i*)held, (__m256i)_mm512_cvtneps_pbh(sum));
    for (int r = from; r < to; r++) y[rows[r]] = held[r];
  };
  skip == 0 && end == kSide ? add(0, kSide) : add(skip, end);
}

}  // namespace tiles
