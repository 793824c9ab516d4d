// Masked mutual attention between pixels and words; the definition is the numpy reference in
// ops/masked_mutual_attention.py.
//
//   forward   one pass over the pixels. A block takes one expression and a run of pixel tiles. For
//             each tile it scores every pixel against every word, masks, takes the softmax, writes
//             f_lav, and adds A^T z_v of the tile to sums that stay in registers. At its end it
//             writes those sums, float32, to the workspace: one partial per block.
//   reduce    one block per word and expression adds the partials in a fixed order and writes
//             f_val. Nothing is added atomically, so results repeat bit by bit.
//
// Half precision multiplies f16 on tensor cores and adds in float32; float32 uses fused
// multiply-adds of float32 throughout (no TF32). Both layer norms take their moments in float32,
// around the mean.
#include "machine.cuh"

// The same fields in the same order as `Arguments` in launch.py.
struct Arguments {
  const void* z_v;        // [N or 1, P, C]
  const void* z_l;        // [N, L, C]
  const void* word_mask;  // [N, L]
  const void* gamma_v;    // [C]
  const void* beta_v;
  const void* gamma_l;
  const void* beta_l;
  void* f_lav;         // [N, P, C]
  void* f_val;         // [N, L, C]
  float* sums;         // [N, splits, L, C], partial A^T z_v
  float* masses;       // [N, splits, L], partial column sums of A; written where normalize is 1
  long long z_v_step;  // elements from one expression's z_v to the next; 0 where it is shared
  int pixels;
  int words;
  int splits;
  int tiles_per_block;
  int longer_blocks;  // the first so many have one tile more
  float threshold;    // on the scaled score: logit of the probability
  float scale;
  float epsilon;
  int normalize;
};

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MASS_FLOOR = 1.0e-6f;
// Weights of half precision are held times 2^15, so that small ones keep their digits: a word that
// every pixel weighs little may still be normalized to weigh one.
constexpr float UNIT = 32768.0f;

struct Tiles {
  int first, last;
};

// The run of tiles of this block; runs differ by one tile at most.
RR_DEVICE Tiles tiles_of_block(const Arguments& a) {
  const int split = blockIdx.x;
  const int first = split * a.tiles_per_block + (split < a.longer_blocks ? split : a.longer_blocks);
  return {first, first + a.tiles_per_block + (split < a.longer_blocks)};
}

// Sums and maxima over eight neighbouring lanes.
RR_DEVICE float sum_of_eight(float x) {
  x += rr_shuffle_xor(x, 1);
  x += rr_shuffle_xor(x, 2);
  return x + rr_shuffle_xor(x, 4);
}

RR_DEVICE float max_of_eight(float x) {
  x = rr_max(x, rr_shuffle_xor(x, 1));
  x = rr_max(x, rr_shuffle_xor(x, 2));
  return rr_max(x, rr_shuffle_xor(x, 4));
}

// Mean and sum of squares around it of GROUPS groups of equal size, from each group's (Chan et al.,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
template <int GROUPS>
RR_DEVICE float2 join_moments(const float2* of_groups, int size) {
  float2 group[GROUPS];
  float mean = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    group[i] = rr_load_shared(of_groups + i);
    mean += group[i].x * (1.0f / GROUPS);
  }
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    const float apart = group[i].x - mean;
    squares += group[i].y + size * apart * apart;
  }
  return rr_float2(mean, squares);
}

// ------------------------------------------------------------------------- half precision

// Shared memory of `Forward`; geometry.py computes the same size. Rows are padded so that the rows
// of an 8 x 8 matrix, and the rows of a fragment, fall on different banks.
template <int C, int WORDS, int PIXELS>
struct Tile {
  static constexpr int ROW = C + 8;
  static constexpr int A_ROW = WORDS + 8;
  static constexpr int S_ROW = WORDS + 8;
  static constexpr int WARPS = 8;
  static constexpr int THREADS = WARPS * 32;
  static constexpr int GROUPS = WARPS / (PIXELS / 16);     // warps that share a row of pixels
  static constexpr int SLICES = WORDS == 32 ? GROUPS : 1;  // of the channels, in a score
  f16 z_l[WORDS * ROW];
  f16 a[PIXELS * A_ROW];
  float s[SLICES][PIXELS * S_ROW];
  float2 moments[PIXELS * GROUPS];
  u32 gamma[C / 2];  // pairs, in the order in which lanes read them: [group, q, tile of eight]
  u32 beta[C / 2];
  f16 z_v[2][PIXELS * ROW];  // the second is used, and allocated, where a block has several tiles
};

RR_DEVICE float sum_of_quad(float x) {
  x += rr_shuffle_xor(x, 1);
  return x + rr_shuffle_xor(x, 2);
}

// Fragments follow the m16n8k16 layout: a lane holds rows g and g + 8 (g = lane / 4) and, of each
// 8 columns, 2q and 2q + 1 (q = lane % 4).
template <int C, int WORDS, int PIXELS>
struct Forward {
  using Memory = Tile<C, WORDS, PIXELS>;
  static constexpr int ROW = Memory::ROW, A_ROW = Memory::A_ROW, S_ROW = Memory::S_ROW;
  static constexpr int WARPS = Memory::WARPS, THREADS = Memory::THREADS;
  static constexpr int ROW_WARPS = PIXELS / 16;
  static constexpr int GROUPS = Memory::GROUPS, SLICES = Memory::SLICES;
  static constexpr int GROUP_C = C / GROUPS;     // channels of f_lav that a warp writes
  static constexpr int N_TILES = GROUP_C / 8;    // ... in tiles of eight
  static constexpr int WORD_TILES = WORDS / 8;   // words in tiles of eight, as columns of S
  static constexpr int WORD_STEPS = WORDS / 16;  // ... and in steps of sixteen, as rows of A^T
  static constexpr int WARP_C = C / WARPS;       // channels of A^T z_v that a warp sums
  static constexpr int SUM_TILES = WARP_C / 8;
  static constexpr int SCORERS = GROUPS / SLICES;  // warps that share the words of a row
  static constexpr int OWN_TILES = (WORD_TILES + SCORERS - 1) / SCORERS;
  static constexpr bool EVEN = OWN_TILES * SCORERS == WORD_TILES;
  static constexpr int OWN_WORDS = WORDS / 8;  // of one pixel, in the softmax
  static constexpr int COPIES = C / 8;         // of 16 bytes, in a row of z_v or z_l
  static_assert(N_TILES % 4 == 0, "four tiles make one 16-byte store");
  static_assert(SUM_TILES % 2 == 0, "tiles are loaded in pairs");
  static_assert(PIXELS * 8 == THREADS, "eight lanes share a pixel in the softmax");
  static_assert(WORDS * COPIES % THREADS == 0, "every thread copies as often");

  const Arguments& a;
  Memory& memory;
  const int lane, g, q, warp, row, group;  // row: first pixel, within the tile, of this lane
  u32 real;                                // one bit for each of this lane's words in the softmax
  float sums[WORD_STEPS][SUM_TILES][4];
  float mass;

  RR_DEVICE Forward(const Arguments& arguments, Memory& shared)
      : a(arguments),
        memory(shared),
        lane(threadIdx.x % 32),
        g(lane / 4),
        q(lane % 4),
        warp(threadIdx.x / 32),
        row(warp % ROW_WARPS * 16 + g),
        group(warp / ROW_WARPS),
        real(0),
        mass(0.0f) {
#pragma unroll
    for (int m = 0; m < WORD_STEPS; m++)
#pragma unroll
      for (int n = 0; n < SUM_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[m][n][e] = 0.0f;
  }

  RR_DEVICE void run() {
    const int n = blockIdx.y;
    const f16* z_v = static_cast<const f16*>(a.z_v) + n * a.z_v_step;
    const Tiles tiles = tiles_of_block(a);
    rr_release_dependents();
    // All loads are on their way before the first is waited for.
    f16 mask[OWN_WORDS];
    u32 gamma = 0, beta = 0;
    load_mask(mask, n);
    if (threadIdx.x < C / 2) {
      gamma = rr_load(static_cast<const u32*>(a.gamma_v) + threadIdx.x);
      beta = rr_load(static_cast<const u32*>(a.beta_v) + threadIdx.x);
    }
    copy_words(n);
    copy_pixels(memory.z_v[0], z_v, tiles.first * PIXELS);
    rr_commit_copies();
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++)
      if (rr_to_float(mask[i]) > 0.0f) real |= 1u << i;
    if (threadIdx.x < C / 2) {
      rr_store_shared(memory.gamma + place_in_norm(threadIdx.x), gamma);
      rr_store_shared(memory.beta + place_in_norm(threadIdx.x), beta);
    }
    for (int tile = tiles.first; tile < tiles.last; tile++) {
      f16* pixels = memory.z_v[(tile - tiles.first) % 2];
      rr_wait_for_copies();
      rr_barrier();
      if (tile + 1 < tiles.last) {
        copy_pixels(memory.z_v[(tile + 1 - tiles.first) % 2], z_v, (tile + 1) * PIXELS);
        rr_commit_copies();
      }
      score(pixels);
      rr_barrier();
      attend(tile * PIXELS);
      rr_barrier();
      collect(pixels);
      if (tile + 1 == tiles.last) write_sums(n);  // under way while the last pixels are normalized
      float out[N_TILES][4];
      mix(out, pixels);
      rr_barrier();
      write_pixels(out, pixels, n, tile * PIXELS);
    }
  }

  RR_DEVICE void copy_words(int n) {
    const f16* z_l = static_cast<const f16*>(a.z_l) + static_cast<long long>(n) * a.words * C;
    const int column = threadIdx.x % COPIES * 8;
#pragma unroll
    for (int i = 0; i < WORDS * COPIES / THREADS; i++) {
      const int word = threadIdx.x / COPIES + i * (THREADS / COPIES);
      const bool present = word < a.words;
      rr_copy_async(memory.z_l + word * ROW + column, z_l + (present ? word : 0) * C + column,
                    present);
    }
  }

  RR_DEVICE void copy_pixels(f16* shared, const f16* z_v, int first_pixel) {
    const int column = threadIdx.x % COPIES * 8;
#pragma unroll
    for (int i = 0; i < PIXELS * COPIES / THREADS; i++) {
      const int pixel = threadIdx.x / COPIES + i * (THREADS / COPIES);
      const bool present = first_pixel + pixel < a.pixels;
      rr_copy_async(shared + pixel * ROW + column,
                    z_v + (present ? first_pixel + pixel : 0) * C + column, present);
    }
  }

  RR_DEVICE void load_mask(f16 (&mask)[OWN_WORDS], int n) {
    const f16* from = static_cast<const f16*>(a.word_mask) + static_cast<long long>(n) * a.words;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      const int word = threadIdx.x % 8 * OWN_WORDS + i;
      mask[i] = word < a.words ? rr_load(from + word) : static_cast<f16>(0);
    }
  }

  // Where the pair of channels 2i, 2i + 1 lies in the order in which lanes read gamma and beta.
  static RR_DEVICE int place_in_norm(int pair) {
    const int channel = 2 * pair % GROUP_C;
    return (2 * pair / GROUP_C * 4 + channel % 8 / 2) * N_TILES + channel / 8;
  }

  // S: the warps of a row share its words, eight at a time, or, where words are few, the channels:
  // then each operand is read from shared memory by fewer warps, and the softmax adds the slices.
  RR_DEVICE void score(const f16* pixels) {
    const int slice = group / SCORERS, scorer = group % SCORERS;
    float s[2][OWN_TILES][4];  // two chains of sums, so that products need not wait
#pragma unroll
    for (int i = 0; i < OWN_TILES; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[0][i][e] = s[1][i][e] = 0.0f;
    const int channel = slice * (C / SLICES);
    const f16* left = pixels + (row - g + lane % 16) * ROW + channel + lane / 16 * 8;
    const f16* right = memory.z_l + (scorer * 8 + lane % 8) * ROW + channel + lane / 8 * 8;
#pragma unroll
    for (int c = 0; c < C / SLICES; c += 32) {
      u32 low[4], high[4];
      rr_load_matrices(low, left + c);
      rr_load_matrices(high, left + c + 16);
#pragma unroll
      for (int i = 0; i < OWN_TILES; i++)
        if (EVEN || scorer + SCORERS * i < WORD_TILES) {
          u32 b[4];
          rr_load_matrices(b, right + i * SCORERS * 8 * ROW + c);
          rr_multiply_add(s[0][i], low, b[0], b[1]);
          rr_multiply_add(s[1][i], high, b[2], b[3]);
        }
    }
    float* to = memory.s[slice] + row * S_ROW + scorer * 8 + 2 * q;
#pragma unroll
    for (int i = 0; i < OWN_TILES; i++)
      if (EVEN || scorer + SCORERS * i < WORD_TILES) {
        rr_store_shared(reinterpret_cast<float2*>(to + i * SCORERS * 8),
                        rr_float2(s[0][i][0] + s[1][i][0], s[0][i][1] + s[1][i][1]));
        rr_store_shared(reinterpret_cast<float2*>(to + i * SCORERS * 8 + 8 * S_ROW),
                        rr_float2(s[0][i][2] + s[1][i][2], s[0][i][3] + s[1][i][3]));
      }
  }

  // A: eight neighbouring lanes share a pixel.
  RR_DEVICE void attend(int first_pixel) {
    const int pixel = threadIdx.x / 8, first_word = threadIdx.x % 8 * OWN_WORDS;
    const u32 usable = first_pixel + pixel < a.pixels ? real : 0u;
    const float none = rr_negative_infinity();
    float s[OWN_WORDS], most = none, total = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i += 2) {
      s[i] = s[i + 1] = 0.0f;
#pragma unroll
      for (int slice = 0; slice < SLICES; slice++) {
        const float2 pair = rr_load_shared(
            reinterpret_cast<const float2*>(memory.s[slice] + pixel * S_ROW + first_word + i));
        s[i] += pair.x;
        s[i + 1] += pair.y;
      }
      s[i] *= a.scale;
      s[i + 1] *= a.scale;
    }
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      if (!(usable >> i & 1u && s[i] >= a.threshold)) s[i] = none;
      most = rr_max(most, s[i]);
    }
    most = max_of_eight(most);
    const float base = most == none ? 0.0f : most * LOG2_E;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      s[i] = rr_exp2(s[i] * LOG2_E - base);
      total += s[i];
    }
    total = sum_of_eight(total);
    const float share = total > 0.0f ? UNIT * rr_reciprocal(total) : 0.0f;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i += 2)
      rr_store_shared(reinterpret_cast<u32*>(memory.a + pixel * A_ROW + first_word + i),
                      rr_pack(s[i] * share, s[i + 1] * share));
  }

  // A z_l + z_v for this warp's pixels and channels, and the moments of each of its rows.
  RR_DEVICE void mix(float (&out)[N_TILES][4], const f16* pixels) {
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = group * GROUP_C + n * 8 + 2 * q;
        const float2 z = rr_unpack(
            rr_load_shared(reinterpret_cast<const u32*>(pixels + (row + 8 * half) * ROW + column)));
        out[n][2 * half] = z.x;
        out[n][2 * half + 1] = z.y;
      }
    const f16* left = memory.a + (row - g + lane % 16) * A_ROW + lane / 16 * 8;
    const f16* right = memory.z_l + lane % 16 * ROW + group * GROUP_C + lane / 16 * 8;
    const u32 unit = rr_pack(1.0f / UNIT, 1.0f / UNIT);
#pragma unroll
    for (int k = 0; k < WORD_STEPS; k++) {
      u32 weights[4];
      rr_load_matrices(weights, left + k * 16);
#pragma unroll
      for (int i = 0; i < 4; i++) weights[i] = rr_multiply_halves(weights[i], unit);
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        u32 b[4];
        rr_load_matrices_transposed(b, right + k * 16 * ROW + n * 8);
        rr_multiply_add(out[n], weights, b[0], b[1]);
        rr_multiply_add(out[n + 1], weights, b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = 0.0f, squares = 0.0f;
#pragma unroll
      for (int n = 0; n < N_TILES; n++) total += out[n][2 * half] + out[n][2 * half + 1];
      const float mean = sum_of_quad(total) * (1.0f / GROUP_C);
#pragma unroll
      for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float centred = out[n][2 * half + e] - mean;
          squares += centred * centred;
        }
      squares = sum_of_quad(squares);
      if (q == 0)
        rr_store_shared(memory.moments + (row + 8 * half) * GROUPS + group,
                        rr_float2(mean, squares));
    }
  }

  // sums += A^T z_v of the tile; each warp sums its own channels over all pixels of the tile.
  RR_DEVICE void collect(const f16* pixels) {
    const f16* right = pixels + lane % 16 * ROW + warp * WARP_C + lane / 16 * 8;
    const f16* left = memory.a + (lane % 8 + lane / 16 * 8) * A_ROW + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < PIXELS; k += 16) {
      u32 b[SUM_TILES / 2][4];
#pragma unroll
      for (int n = 0; n < SUM_TILES / 2; n++)
        rr_load_matrices_transposed(b[n], right + k * ROW + n * 16);
#pragma unroll
      for (int m = 0; m < WORD_STEPS; m++) {
        u32 weights[4];
        rr_load_matrices_transposed(weights, left + k * A_ROW + m * 16);
#pragma unroll
        for (int n = 0; n < SUM_TILES / 2; n++) {
          rr_multiply_add(sums[m][2 * n], weights, b[n][0], b[n][1]);
          rr_multiply_add(sums[m][2 * n + 1], weights, b[n][2], b[n][3]);
        }
      }
    }
    if (a.normalize && threadIdx.x < WORDS)
#pragma unroll 4
      for (int pixel = 0; pixel < PIXELS; pixel++)
        mass += rr_to_float(rr_load_shared(memory.a + pixel * A_ROW + threadIdx.x));
  }

  // Layer norm, and f_lav. A warp's results pass through its part of the tile, which nobody else
  // reads any more, so that they leave in whole rows.
  RR_DEVICE void write_pixels(const float (&out)[N_TILES][4], f16* pixels, int n, int first_pixel) {
    float factor[2], shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 whole =
          join_moments<GROUPS>(memory.moments + (row + 8 * half) * GROUPS, GROUP_C);
      factor[half] = rr_rsqrt(whole.y * (1.0f / C) + a.epsilon);
      shift[half] = -whole.x * factor[half];
    }
    const int norm = (group * 4 + q) * N_TILES;
#pragma unroll
    for (int first = 0; first < N_TILES; first += 4) {
      const uint4 gammas = rr_load_shared(reinterpret_cast<uint4*>(memory.gamma + norm + first));
      const uint4 betas = rr_load_shared(reinterpret_cast<uint4*>(memory.beta + norm + first));
      const u32 gamma[4] = {gammas.x, gammas.y, gammas.z, gammas.w};
      const u32 beta[4] = {betas.x, betas.y, betas.z, betas.w};
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = group * GROUP_C + (first + i) * 8 + 2 * q;
          const u32 normal = rr_pack(out[first + i][2 * half] * factor[half] + shift[half],
                                     out[first + i][2 * half + 1] * factor[half] + shift[half]);
          rr_store_shared(reinterpret_cast<u32*>(pixels + (row + 8 * half) * ROW + column),
                          rr_multiply_add_halves(normal, gamma[i], beta[i]));
        }
    }
    rr_warp_barrier();
    constexpr int CHUNKS = GROUP_C / 8;  // of 16 bytes, in a row of this warp's part
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
      const int pixel = row - g + i * (32 / CHUNKS) + lane / CHUNKS;
      const int column = group * GROUP_C + lane % CHUNKS * 8;
      if (first_pixel + pixel < a.pixels)
        rr_store(reinterpret_cast<uint4*>(
                     static_cast<f16*>(a.f_lav) +
                     (static_cast<long long>(n) * a.pixels + first_pixel + pixel) * C + column),
                 rr_load_shared(reinterpret_cast<const uint4*>(pixels + pixel * ROW + column)));
    }
  }

  RR_DEVICE void write_sums(int n) {
    const long long block = static_cast<long long>(n) * a.splits + blockIdx.x;
    float* to = a.sums + block * a.words * C + warp * WARP_C + 2 * q;
#pragma unroll
    for (int m = 0; m < WORD_STEPS; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int word = m * 16 + g + 8 * half;
        if (word < a.words)
#pragma unroll
          for (int i = 0; i < SUM_TILES; i++)
            rr_store(reinterpret_cast<float2*>(to + word * C + i * 8),
                     rr_float2(sums[m][i][2 * half] * (1.0f / UNIT),
                               sums[m][i][2 * half + 1] * (1.0f / UNIT)));
      }
    if (a.normalize && static_cast<int>(threadIdx.x) < a.words)
      rr_store(a.masses + block * a.words + threadIdx.x, mass * (1.0f / UNIT));
  }
};

// ------------------------------------------------------------------------- single precision

template <int C>
struct SingleTile {
  static constexpr int THREADS = 256;
  static constexpr int PIXELS = 32;
  static constexpr int ROW = C + 4;
};

RR_DEVICE float dot(float4 a, float4 b, float sum) {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

template <int C, int WORDS>
struct SingleForward {
  static constexpr int PIXELS = SingleTile<C>::PIXELS, ROW = SingleTile<C>::ROW;
  static constexpr int THREADS = SingleTile<C>::THREADS;
  static constexpr int OWN_WORDS = WORDS / 8;  // scores of a lane: words i, i + 8, ...
  static constexpr int QUADS = C / 32;         // channels of a lane, in fours
  static constexpr int HALVES = THREADS / C;   // threads that share a channel of A^T z_v
  static constexpr int SUM_WORDS = WORDS / HALVES;
  static constexpr bool STAGED = WORDS * C <= 80 * 128;  // the words fit in shared memory

  const Arguments& a;
  float* const z_v;            // [PIXELS, ROW] in shared memory
  float* const weights;        // [PIXELS, WORDS]
  float* const z_l;            // [WORDS, ROW], where staged
  const float* const z_l_far;  // [L, C] in global memory
  const int pixel, part, channel, first_word;
  float sums[SUM_WORDS];
  float mass;

  RR_DEVICE SingleForward(const Arguments& arguments, unsigned char* shared)
      : a(arguments),
        z_v(reinterpret_cast<float*>(shared)),
        weights(z_v + PIXELS * ROW),
        z_l(weights + PIXELS * WORDS),
        z_l_far(static_cast<const float*>(a.z_l) +
                static_cast<long long>(blockIdx.y) * a.words * C),
        pixel(threadIdx.x / 8),
        part(threadIdx.x % 8),
        channel(threadIdx.x % C),
        first_word(threadIdx.x / C * SUM_WORDS),
        mass(0.0f) {
#pragma unroll
    for (int i = 0; i < SUM_WORDS; i++) sums[i] = 0.0f;
  }

  RR_DEVICE void run() {
    const int n = blockIdx.y;
    const float* from = static_cast<const float*>(a.z_v) + n * a.z_v_step;
    const Tiles tiles = tiles_of_block(a);
    rr_release_dependents();
    if (STAGED) copy_words();
    for (int tile = tiles.first; tile < tiles.last; tile++) {
      copy_tile(from, tile * PIXELS);
      rr_barrier();
      attend(n, tile * PIXELS);
      rr_barrier();
      write_pixel(n, tile * PIXELS);
      collect();
      rr_barrier();
    }
    write_sums(n);
  }

  RR_DEVICE void copy_words() {
    for (int i = threadIdx.x; i < WORDS * (C / 4); i += THREADS) {
      const int word = i / (C / 4), column = i % (C / 4) * 4;
      const bool present = word < a.words;
      rr_copy_async(z_l + word * ROW + column, z_l_far + (present ? word : 0) * C + column,
                    present);
    }
  }

  RR_DEVICE float4 word_at(int word, int column) const {
    if (STAGED) return rr_load_shared(reinterpret_cast<const float4*>(z_l + word * ROW + column));
    return rr_load(reinterpret_cast<const float4*>(z_l_far + word * C + column));
  }

  RR_DEVICE void copy_tile(const float* from, int first_pixel) {
    for (int i = threadIdx.x; i < PIXELS * (C / 4); i += THREADS) {
      const int row = i / (C / 4), column = i % (C / 4) * 4;
      const bool present = first_pixel + row < a.pixels;
      const long long source = present ? first_pixel + row : 0;
      rr_copy_async(z_v + row * ROW + column, from + source * C + column, present);
    }
    rr_commit_copies();
    rr_wait_for_copies();
  }

  RR_DEVICE void attend(int n, int first_pixel) {
    const float* mask =
        static_cast<const float*>(a.word_mask) + static_cast<long long>(n) * a.words;
    const float none = rr_negative_infinity();
    float s[OWN_WORDS], most = none, total = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) s[i] = 0.0f;
#pragma unroll 2
    for (int c = 0; c < C; c += 4) {
      const float4 z = rr_load_shared(reinterpret_cast<const float4*>(z_v + pixel * ROW + c));
#pragma unroll
      for (int i = 0; i < OWN_WORDS; i++) {
        const int word = part + 8 * i;
        if (STAGED || word < a.words) s[i] = dot(z, word_at(word, c), s[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      const int word = part + 8 * i;
      const bool real = word < a.words && rr_load(mask + (word < a.words ? word : 0)) > 0.0f;
      s[i] *= a.scale;
      if (!(real && first_pixel + pixel < a.pixels && s[i] >= a.threshold)) s[i] = none;
      most = rr_max(most, s[i]);
    }
    most = max_of_eight(most);
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++) {
      s[i] = most == none ? 0.0f : rr_exp(s[i] - most);
      total += s[i];
    }
    total = sum_of_eight(total);
    const float share = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < OWN_WORDS; i++)
      rr_store_shared(weights + pixel * WORDS + part + 8 * i, s[i] * share);
  }

  RR_DEVICE void write_pixel(int n, int first_pixel) {
    float4 out[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++)
      out[i] =
          rr_load_shared(reinterpret_cast<const float4*>(z_v + pixel * ROW + part * 4 + 32 * i));
#pragma unroll 2
    for (int word = 0; word < a.words; word++) {
      const float weight = rr_load_shared(weights + pixel * WORDS + word);
#pragma unroll
      for (int i = 0; i < QUADS; i++) {
        const float4 z = word_at(word, part * 4 + 32 * i);
        out[i].x += weight * z.x;
        out[i].y += weight * z.y;
        out[i].z += weight * z.z;
        out[i].w += weight * z.w;
      }
    }
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) total += out[i].x + out[i].y + out[i].z + out[i].w;
    const float mean = sum_of_eight(total) * (1.0f / C);
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      out[i] = rr_float4(out[i].x - mean, out[i].y - mean, out[i].z - mean, out[i].w - mean);
      squares = dot(out[i], out[i], squares);
    }
    const float factor = rr_rsqrt(sum_of_eight(squares) * (1.0f / C) + a.epsilon);
    if (first_pixel + pixel >= a.pixels) return;
    float* to = static_cast<float*>(a.f_lav) +
                (static_cast<long long>(n) * a.pixels + first_pixel + pixel) * C;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const int column = part * 4 + 32 * i;
      const float4 w =
          rr_load(reinterpret_cast<const float4*>(static_cast<const float*>(a.gamma_v) + column));
      const float4 b =
          rr_load(reinterpret_cast<const float4*>(static_cast<const float*>(a.beta_v) + column));
      rr_store(reinterpret_cast<float4*>(to + column),
               rr_float4(out[i].x * factor * w.x + b.x, out[i].y * factor * w.y + b.y,
                         out[i].z * factor * w.z + b.z, out[i].w * factor * w.w + b.w));
    }
  }

  RR_DEVICE void collect() {
#pragma unroll 4
    for (int row = 0; row < PIXELS; row++) {
      const float z = rr_load_shared(z_v + row * ROW + channel);
#pragma unroll
      for (int i = 0; i < SUM_WORDS; i += 4) {
        const float4 w =
            rr_load_shared(reinterpret_cast<const float4*>(weights + row * WORDS + first_word + i));
        sums[i] += w.x * z;
        sums[i + 1] += w.y * z;
        sums[i + 2] += w.z * z;
        sums[i + 3] += w.w * z;
      }
    }
    if (a.normalize && threadIdx.x < WORDS)
#pragma unroll 4
      for (int row = 0; row < PIXELS; row++)
        mass += rr_load_shared(weights + row * WORDS + threadIdx.x);
  }

  RR_DEVICE void write_sums(int n) {
    const long long block = static_cast<long long>(n) * a.splits + blockIdx.x;
#pragma unroll
    for (int i = 0; i < SUM_WORDS; i++)
      if (first_word + i < a.words)
        rr_store(a.sums + (block * a.words + first_word + i) * C + channel, sums[i]);
    if (a.normalize && static_cast<int>(threadIdx.x) < a.words)
      rr_store(a.masses + block * a.words + threadIdx.x, mass);
  }
};

// ------------------------------------------------------------------------- reduction

RR_DEVICE float read_number(const float* from) { return rr_load(from); }
RR_DEVICE float read_number(const f16* from) { return rr_to_float(rr_load(from)); }
RR_DEVICE void write_number(float* to, float value) { rr_store(to, value); }
RR_DEVICE void write_number(f16* to, float value) { rr_store(to, rr_to_half(value)); }

RR_DEVICE float sum_of_warp(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += rr_shuffle_xor(x, distance);
  return x;
}

// f_val of one word: partials of A^T z_v in a fixed order, z_l, layer norm.
template <typename T, int C>
RR_DEVICE void reduce(const Arguments& a, unsigned char* raw) {
  constexpr int LOADS = 16;
  constexpr int LANES = C / 4;    // threads that read one partial, four channels each
  constexpr int GROUPS = C / 32;  // warps that finish the word, a channel for each lane
  const int readers = blockDim.x / LANES, reader = threadIdx.x / LANES;
  const int column = threadIdx.x % LANES * 4, channel = threadIdx.x;
  const int word = blockIdx.x, n = blockIdx.y;
  const long long at = (static_cast<long long>(n) * a.words + word) * C + channel;
  float* partial = reinterpret_cast<float*>(raw);                      // [readers, C]
  float2* moments = reinterpret_cast<float2*>(partial + readers * C);  // [GROUPS]
  float* masses = reinterpret_cast<float*>(moments + GROUPS);          // [readers]
  float z = 0.0f, weight = 0.0f, bias = 0.0f;
  if (channel < C) {  // inputs, which no kernel of this launch writes: before the wait
    z = read_number(static_cast<const T*>(a.z_l) + at);
    weight = read_number(static_cast<const T*>(a.gamma_l) + channel);
    bias = read_number(static_cast<const T*>(a.beta_l) + channel);
  }
  rr_wait_for_prior_grid();
  const float* from = a.sums + (static_cast<long long>(n) * a.splits * a.words + word) * C + column;
  const float* mass_from = a.masses + static_cast<long long>(n) * a.splits * a.words + word;
  float4 sum = rr_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float mass = 0.0f;
  for (int first = reader; first < a.splits; first += LOADS * readers) {
    float4 x[LOADS];  // all on their way before the first is needed
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const int split = first + k * readers;
      x[k] = rr_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (split < a.splits)
        x[k] = rr_load_coherent(reinterpret_cast<const float4*>(from + split * a.words * C));
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++)
      sum = rr_float4(sum.x + x[k].x, sum.y + x[k].y, sum.z + x[k].z, sum.w + x[k].w);
  }
  if (a.normalize)
    for (int i = reader; i < a.splits; i += readers)
      mass += rr_load_coherent(mass_from + i * a.words);
  rr_store_shared(reinterpret_cast<float4*>(partial + reader * C + column), sum);
  if (column == 0) rr_store_shared(masses + reader, mass);
  rr_barrier();
  float x = 0.0f;
  if (channel < C) {
    for (int i = 0; i < readers; i++) x += rr_load_shared(partial + i * C + channel);
    if (a.normalize) {
      float total = 0.0f;
      for (int i = 0; i < readers; i++) total += rr_load_shared(masses + i);
      x /= total + MASS_FLOOR;
    }
    x += z;
  }
  const float own_mean = sum_of_warp(x) * (1.0f / 32);
  const float own_squares = sum_of_warp((x - own_mean) * (x - own_mean));
  if (channel < C && channel % 32 == 0)
    rr_store_shared(moments + channel / 32, rr_float2(own_mean, own_squares));
  rr_barrier();
  if (channel >= C) return;
  const float2 whole = join_moments<GROUPS>(moments, 32);
  const float factor = rr_rsqrt(whole.y * (1.0f / C) + a.epsilon);
  write_number(static_cast<T*>(a.f_val) + at, (x - whole.x) * factor * weight + bias);
}

}  // namespace

// ------------------------------------------------------------------------- entry points
// forward_<type>_c<C>_w<WORDS>_p<PIXELS> and reduce_<type>_c<C>; launch.py knows the same table.

#define HALF_FORWARD(C, WORDS, PIXELS, BLOCKS)                                                 \
  RR_KERNEL(256, BLOCKS) forward_f16_c##C##_w##WORDS##_p##PIXELS(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                                            \
    Forward<C, WORDS, PIXELS>(a, *reinterpret_cast<Tile<C, WORDS, PIXELS>*>(raw)).run();       \
  }

#define SINGLE_FORWARD(C, WORDS)                                                    \
  RR_KERNEL(256, 1) forward_f32_c##C##_w##WORDS##_p32(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                                 \
    SingleForward<C, WORDS>(a, raw).run();                                          \
  }

#define REDUCE(NAME, TYPE, C)                                          \
  RR_KERNEL(512, 2) reduce_##NAME##_c##C(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                    \
    reduce<TYPE, C>(a, raw);                                           \
  }

HALF_FORWARD(128, 32, 32, 2)
HALF_FORWARD(128, 80, 32, 1)
HALF_FORWARD(256, 32, 32, 2)
HALF_FORWARD(256, 80, 32, 1)
SINGLE_FORWARD(128, 32)
SINGLE_FORWARD(128, 80)
SINGLE_FORWARD(256, 32)
SINGLE_FORWARD(256, 80)
REDUCE(f16, f16, 128)
REDUCE(f16, f16, 256)
REDUCE(f32, float, 128)
REDUCE(f32, float, 256)
