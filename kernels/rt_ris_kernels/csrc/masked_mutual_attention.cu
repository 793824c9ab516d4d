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
  void* f_lav;        // [N, P, C]
  void* f_val;        // [N, L, C]
  float* sums;        // [N, splits, L, C], partial A^T z_v
  float* masses;      // [N, splits, L], partial column sums of A; written where normalize is 1
  long long z_v_step;  // elements from one expression's z_v to the next; 0 where it is shared
  int pixels;
  int words;
  int splits;
  float threshold;  // on the scaled score: logit of the probability
  float scale;
  float epsilon;
  int normalize;
};

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MASS_FLOOR = 1.0e-6f;
// Weights of half precision are held times 2^15, so that small ones keep their digits: a word that
// every pixel weighs little may still be normalized to weigh one.
constexpr float UNIT = 32768.0f;

struct Tiles {
  int first, last;
};

// The run of tiles of this block; runs differ by one tile at most.
RR_DEVICE Tiles tiles_of_block(const Arguments& a, int tile_pixels) {
  const int count = (a.pixels + tile_pixels - 1) / tile_pixels;
  const int split = blockIdx.x;
  return {static_cast<int>(static_cast<long long>(split) * count / a.splits),
          static_cast<int>(static_cast<long long>(split + 1) * count / a.splits)};
}

// ------------------------------------------------------------------------- half precision

// Shared memory of `forward`; launch.py computes the same size. Rows are padded so that the rows
// of an 8 x 8 matrix, and the rows of a fragment, fall on different banks.
template <int C, int WORDS, int PIXELS>
struct Tile {
  static constexpr int ROW = C + 8;
  static constexpr int A_ROW = WORDS + 8;
  static constexpr int S_ROW = WORDS + 8;
  static constexpr int GROUPS = WARPS / (PIXELS / 16);  // warps that share a row of pixels
  f16 z_l[WORDS * ROW];
  f16 a[PIXELS * A_ROW];
  float s[PIXELS * S_ROW];
  float2 moments[PIXELS * GROUPS];
  float real[WORDS];
  f16 z_v[2][PIXELS * ROW];  // the second is used, and allocated, where a block has several tiles
};

template <int C, int PIXELS, int ROW>
RR_DEVICE void copy_pixels(const Arguments& a, f16* shared, const f16* z_v, int first_pixel) {
  for (int i = threadIdx.x; i < PIXELS * (C / 8); i += THREADS) {
    const int row = i / (C / 8), column = i % (C / 8) * 8;
    const bool present = first_pixel + row < a.pixels;
    const int pixel = present ? first_pixel + row : 0;
    rr_copy_async(shared + row * ROW + column, z_v + pixel * C + column, present);
  }
}

// One of a pair of lanes gives its `high` for the other's `low`.
RR_DEVICE void swap_with(u32& low, u32& high, bool second, int distance) {
  const u32 got = rr_shuffle_xor(second ? low : high, distance);
  low = second ? got : low;
  high = second ? high : got;
}

// Exchanges 32-bit values among the four lanes of a quad: lane q gets what the lanes hold at q.
RR_DEVICE void transpose_quad(u32 (&x)[4], int lane_in_quad) {
  const bool odd = lane_in_quad & 1, upper = lane_in_quad & 2;
  swap_with(x[0], x[1], odd, 1);
  swap_with(x[2], x[3], odd, 1);
  swap_with(x[0], x[2], upper, 2);
  swap_with(x[1], x[3], upper, 2);
}

RR_DEVICE float sum_of_quad(float x) {
  x += rr_shuffle_xor(x, 1);
  return x + rr_shuffle_xor(x, 2);
}

RR_DEVICE float max_of_quad(float x) {
  x = rr_max(x, rr_shuffle_xor(x, 1));
  return rr_max(x, rr_shuffle_xor(x, 2));
}

// Fragments follow the m16n8k16 layout: a lane holds rows g and g + 8 (g = lane / 4) and, of each
// 8 columns, 2q and 2q + 1 (q = lane % 4).
template <int C, int WORDS, int PIXELS>
struct Forward {
  using Memory = Tile<C, WORDS, PIXELS>;
  static constexpr int ROW = Memory::ROW, A_ROW = Memory::A_ROW, S_ROW = Memory::S_ROW;
  static constexpr int ROW_WARPS = PIXELS / 16;
  static constexpr int GROUPS = Memory::GROUPS;
  static constexpr int GROUP_C = C / GROUPS;       // channels of f_lav that a warp writes
  static constexpr int N_TILES = GROUP_C / 8;      // ... in tiles of eight
  static constexpr int WORD_TILES = WORDS / 8;     // words in tiles of eight, as columns of S
  static constexpr int WORD_STEPS = WORDS / 16;    // ... and in steps of sixteen, as rows of A^T
  static constexpr int WARP_C = C / WARPS;         // channels of A^T z_v that a warp sums
  static constexpr int SUM_TILES = WARP_C / 8;
  static constexpr int OWN_TILES = (WORD_TILES + GROUPS - 1) / GROUPS;
  static_assert(N_TILES % 4 == 0, "four tiles make one 16-byte store");
  static_assert(SUM_TILES % 2 == 0, "tiles are loaded in pairs");

  const Arguments& a;
  Memory& memory;
  const int lane, g, q, warp, row, group;  // row: first pixel, within the tile, of this lane
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
    const Tiles tiles = tiles_of_block(a, PIXELS);
    rr_release_dependents();
    copy_words(n);
    copy_pixels<C, PIXELS, ROW>(a, memory.z_v[0], z_v, tiles.first * PIXELS);
    rr_commit_copies();
    for (int tile = tiles.first; tile < tiles.last; tile++) {
      const f16* pixels = memory.z_v[(tile - tiles.first) % 2];
      rr_wait_for_copies();
      rr_barrier();
      if (tile + 1 < tiles.last) {
        f16* next = memory.z_v[(tile + 1 - tiles.first) % 2];
        copy_pixels<C, PIXELS, ROW>(a, next, z_v, (tile + 1) * PIXELS);
        rr_commit_copies();
      }
      score(pixels);
      rr_barrier();
      u32 weights[WORD_STEPS][4];
      attend(weights, tile * PIXELS);
      float out[N_TILES][4];
      mix(out, weights, pixels);
      rr_barrier();
      collect(pixels);  // before write_pixels: the other order needs more registers
      write_pixels(out, n, tile * PIXELS);
    }
    write_sums(n);
  }

  RR_DEVICE void copy_words(int n) {
    const f16* z_l = static_cast<const f16*>(a.z_l) + static_cast<long long>(n) * a.words * C;
    for (int i = threadIdx.x; i < WORDS * (C / 8); i += THREADS) {
      const int word = i / (C / 8), column = i % (C / 8) * 8;
      const bool present = word < a.words;
      rr_copy_async(memory.z_l + word * ROW + column, z_l + (present ? word : 0) * C + column,
                    present);
    }
    const f16* mask = static_cast<const f16*>(a.word_mask) + static_cast<long long>(n) * a.words;
    if (threadIdx.x < WORDS) {
      const int word = threadIdx.x;
      const bool real = word < a.words && rr_to_float(rr_load(mask + word)) > 0.0f;
      rr_store_shared(memory.real + word, real ? 1.0f : 0.0f);
    }
  }

  // S: the warps of a row share its words, eight at a time.
  RR_DEVICE void score(const f16* pixels) {
    float s[2][OWN_TILES][4];  // two chains of sums, so that products need not wait
#pragma unroll
    for (int i = 0; i < OWN_TILES; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[0][i][e] = s[1][i][e] = 0.0f;
    const f16* left = pixels + (row - g + lane % 16) * ROW + lane / 16 * 8;
    const f16* right = memory.z_l + lane % 8 * ROW + lane / 8 * 8;
#pragma unroll 2
    for (int c = 0; c < C; c += 32) {
      u32 low[4], high[4];
      rr_load_matrices(low, left + c);
      rr_load_matrices(high, left + c + 16);
#pragma unroll
      for (int i = 0; i < OWN_TILES; i++) {
        const int j = group + GROUPS * i;
        if (j < WORD_TILES) {
          u32 b[4];
          rr_load_matrices(b, right + j * 8 * ROW + c);
          rr_multiply_add(s[0][i], low, b[0], b[1]);
          rr_multiply_add(s[1][i], high, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < OWN_TILES; i++) {
      const int j = group + GROUPS * i;
      if (j < WORD_TILES) {
        float* to = memory.s + row * S_ROW + j * 8 + 2 * q;
        const float2 upper =
            rr_float2((s[0][i][0] + s[1][i][0]) * a.scale, (s[0][i][1] + s[1][i][1]) * a.scale);
        const float2 lower =
            rr_float2((s[0][i][2] + s[1][i][2]) * a.scale, (s[0][i][3] + s[1][i][3]) * a.scale);
        rr_store_shared(reinterpret_cast<float2*>(to), upper);
        rr_store_shared(reinterpret_cast<float2*>(to + 8 * S_ROW), lower);
      }
    }
  }

  // A, as left operands, and in shared memory for `collect`.
  RR_DEVICE void attend(u32 (&weights)[WORD_STEPS][4], int first_pixel) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int pixel = row + 8 * half;
      const float none = rr_negative_infinity();
      float s[WORD_TILES][2], most = none, total = 0.0f;
#pragma unroll
      for (int j = 0; j < WORD_TILES; j++) {
        const int word = j * 8 + 2 * q;
        const float2 pair =
            rr_load_shared(reinterpret_cast<const float2*>(memory.s + pixel * S_ROW + word));
        const float2 real = rr_load_shared(reinterpret_cast<const float2*>(memory.real + word));
        const bool inside = first_pixel + pixel < a.pixels;
        s[j][0] = inside && real.x > 0.0f && pair.x >= a.threshold ? pair.x : none;
        s[j][1] = inside && real.y > 0.0f && pair.y >= a.threshold ? pair.y : none;
        most = rr_max(most, rr_max(s[j][0], s[j][1]));
      }
      most = max_of_quad(most);
#pragma unroll
      for (int j = 0; j < WORD_TILES; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          s[j][e] = most == none ? 0.0f : rr_exp2((s[j][e] - most) * LOG2_E);
          total += s[j][e];
        }
      total = sum_of_quad(total);
      const float share = total > 0.0f ? UNIT / total : 0.0f;
#pragma unroll
      for (int j = 0; j < WORD_TILES; j++) {
        const u32 pair = rr_pack(s[j][0] * share, s[j][1] * share);
        weights[j / 2][j % 2 * 2 + half] = pair;
        if (j % GROUPS == group)
          rr_store_shared(reinterpret_cast<u32*>(memory.a + pixel * A_ROW + j * 8 + 2 * q), pair);
      }
    }
  }

  // A z_l + z_v for this warp's pixels and channels, and the moments of each of its rows.
  RR_DEVICE void mix(float (&out)[N_TILES][4], const u32 (&weights)[WORD_STEPS][4],
                     const f16* pixels) {
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = group * GROUP_C + n * 8 + 2 * q;
        const float2 z = rr_unpack(rr_load_shared(
            reinterpret_cast<const u32*>(pixels + (row + 8 * half) * ROW + column)));
        out[n][2 * half] = z.x * UNIT;
        out[n][2 * half + 1] = z.y * UNIT;
      }
    const f16* right = memory.z_l + lane % 16 * ROW + group * GROUP_C + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < WORD_STEPS; k++)
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        u32 b[4];
        rr_load_matrices_transposed(b, right + k * 16 * ROW + n * 8);
        rr_multiply_add(out[n], weights[k], b[0], b[1]);
        rr_multiply_add(out[n + 1], weights[k], b[2], b[3]);
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = 0.0f, squares = 0.0f;
#pragma unroll
      for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          out[n][2 * half + e] *= 1.0f / UNIT;
          total += out[n][2 * half + e];
        }
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

  // Layer norm over all channels from the moments of the groups (Chan et al., 1979), and f_lav.
  RR_DEVICE void write_pixels(float (&out)[N_TILES][4], int n, int first_pixel) {
    const f16* gamma = static_cast<const f16*>(a.gamma_v);
    const f16* beta = static_cast<const f16*>(a.beta_v);
    f16* f_lav = static_cast<f16*>(a.f_lav) +
                 (static_cast<long long>(n) * a.pixels + first_pixel + row) * C + group * GROUP_C + q * 8;
    float mean[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float2 part[GROUPS];
      mean[half] = 0.0f;
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        part[i] = rr_load_shared(memory.moments + (row + 8 * half) * GROUPS + i);
        mean[half] += part[i].x * (1.0f / GROUPS);
      }
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const float apart = part[i].x - mean[half];
        squares += part[i].y + GROUP_C * apart * apart;
      }
      factor[half] = rr_rsqrt(squares * (1.0f / C) + a.epsilon);
    }
#pragma unroll
    for (int first = 0; first < N_TILES; first += 4) {
      u32 values[2][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = group * GROUP_C + (first + i) * 8 + 2 * q;
        const float2 weight = rr_unpack(rr_load_in_place(gamma + column));
        const float2 bias = rr_unpack(rr_load_in_place(beta + column));
#pragma unroll
        for (int half = 0; half < 2; half++)
          values[half][i] = rr_pack(
              (out[first + i][2 * half] - mean[half]) * factor[half] * weight.x + bias.x,
              (out[first + i][2 * half + 1] - mean[half]) * factor[half] * weight.y + bias.y);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        transpose_quad(values[half], q);
        if (first_pixel + row + 8 * half < a.pixels)
          rr_store(reinterpret_cast<uint4*>(f_lav + 8 * half * C + first * 8),
                   rr_uint4(values[half][0], values[half][1], values[half][2], values[half][3]));
      }
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
                     rr_float2(sums[m][i][2 * half] * (1.0f / UNIT), sums[m][i][2 * half + 1] * (1.0f / UNIT)));
      }
    if (a.normalize && static_cast<int>(threadIdx.x) < a.words)
      rr_store(a.masses + block * a.words + threadIdx.x, mass * (1.0f / UNIT));
  }
};

// ------------------------------------------------------------------------- single precision

template <int C>
struct SingleTile {
  static constexpr int PIXELS = 32;
  static constexpr int ROW = C + 4;
};

// Eight neighbouring lanes share a pixel.
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

RR_DEVICE float dot(float4 a, float4 b, float sum) {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

template <int C, int WORDS>
struct SingleForward {
  static constexpr int PIXELS = SingleTile<C>::PIXELS, ROW = SingleTile<C>::ROW;
  static constexpr int OWN_WORDS = WORDS / 8;     // scores of a lane: words i, i + 8, ...
  static constexpr int QUADS = C / 32;            // channels of a lane, in fours
  static constexpr int HALVES = THREADS / C;      // threads that share a channel of A^T z_v
  static constexpr int SUM_WORDS = WORDS / HALVES;

  const Arguments& a;
  float* const z_v;  // [PIXELS, ROW] in shared memory
  float* const weights;  // [PIXELS, WORDS]
  const int pixel, part, channel, first_word;
  float sums[SUM_WORDS];
  float mass;

  RR_DEVICE SingleForward(const Arguments& arguments, unsigned char* shared)
      : a(arguments),
        z_v(reinterpret_cast<float*>(shared)),
        weights(z_v + PIXELS * ROW),
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
    const Tiles tiles = tiles_of_block(a, PIXELS);
    rr_release_dependents();
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
    const float* z_l = static_cast<const float*>(a.z_l) + static_cast<long long>(n) * a.words * C;
    const float* mask = static_cast<const float*>(a.word_mask) + static_cast<long long>(n) * a.words;
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
        if (word < a.words)
          s[i] = dot(z, rr_load(reinterpret_cast<const float4*>(z_l + word * C + c)), s[i]);
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
    const float* z_l = static_cast<const float*>(a.z_l) + static_cast<long long>(n) * a.words * C;
    float4 out[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++)
      out[i] = rr_load_shared(
          reinterpret_cast<const float4*>(z_v + pixel * ROW + part * 4 + 32 * i));
#pragma unroll 2
    for (int word = 0; word < a.words; word++) {
      const float weight = rr_load_shared(weights + pixel * WORDS + word);
#pragma unroll
      for (int i = 0; i < QUADS; i++) {
        const float4 z = rr_load(reinterpret_cast<const float4*>(z_l + word * C + part * 4 + 32 * i));
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
      const float4 w = rr_load(reinterpret_cast<const float4*>(static_cast<const float*>(a.gamma_v) + column));
      const float4 b = rr_load(reinterpret_cast<const float4*>(static_cast<const float*>(a.beta_v) + column));
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
        const float4 w = rr_load_shared(
            reinterpret_cast<const float4*>(weights + row * WORDS + first_word + i));
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

// The sum over the first C threads, for all of them. `shared` holds C / 32 numbers of its own.
template <int C>
RR_DEVICE float sum_of_channels(float x, float* shared) {
  const float mine = sum_of_warp(x);
  if (threadIdx.x < C && threadIdx.x % 32 == 0) rr_store_shared(shared + threadIdx.x / 32, mine);
  rr_barrier();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < C / 32; i++) total += rr_load_shared(shared + i);
  return total;
}

// f_val of one word: partials of A^T z_v in a fixed order, z_l, layer norm.
template <typename T, int C>
RR_DEVICE void reduce(const Arguments& a, unsigned char* raw) {
  constexpr int LANES = C / 4;  // threads that read one partial, four channels each
  const int groups = blockDim.x / LANES, group = threadIdx.x / LANES;
  const int column = threadIdx.x % LANES * 4;
  const int word = blockIdx.x, n = blockIdx.y;
  float* partial = reinterpret_cast<float*>(raw);  // [groups, C]
  float* masses = partial + groups * C;            // [groups]
  float* moments = masses + groups;                // [2, C / 32]
  rr_wait_for_prior_grid();
  const float* from = a.sums + (static_cast<long long>(n) * a.splits * a.words + word) * C + column;
  const float* mass_from = a.masses + static_cast<long long>(n) * a.splits * a.words + word;
  float4 sum = rr_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float mass = 0.0f;
#pragma unroll 8
  for (int i = group; i < a.splits; i += groups) {
    const float4 x = rr_load_coherent(
        reinterpret_cast<const float4*>(from + static_cast<long long>(i) * a.words * C));
    sum = rr_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  if (a.normalize)
    for (int i = group; i < a.splits; i += groups)
      mass += rr_load_coherent(mass_from + static_cast<long long>(i) * a.words);
  rr_store_shared(reinterpret_cast<float4*>(partial + group * C + column), sum);
  if (column == 0) rr_store_shared(masses + group, mass);
  rr_barrier();
  const int channel = threadIdx.x;
  float x = 0.0f;
  const long long at = (static_cast<long long>(n) * a.words + word) * C + channel;
  if (channel < C) {
    for (int i = 0; i < groups; i++) x += rr_load_shared(partial + i * C + channel);
    if (a.normalize) {
      float total = 0.0f;
      for (int i = 0; i < groups; i++) total += rr_load_shared(masses + i);
      x /= total + MASS_FLOOR;
    }
    x += read_number(static_cast<const T*>(a.z_l) + at);
  }
  const float mean = sum_of_channels<C>(x, moments) * (1.0f / C);
  const float centred = x - mean;
  const float squares = sum_of_channels<C>(centred * centred, moments + C / 32);
  if (channel < C) {
    const float weight = read_number(static_cast<const T*>(a.gamma_l) + channel);
    const float bias = read_number(static_cast<const T*>(a.beta_l) + channel);
    const float factor = rr_rsqrt(squares * (1.0f / C) + a.epsilon);
    write_number(static_cast<T*>(a.f_val) + at, centred * factor * weight + bias);
  }
}

}  // namespace

// ------------------------------------------------------------------------- entry points
// forward_<type>_c<C>_w<WORDS>_p<PIXELS> and reduce_<type>_c<C>; launch.py knows the same table.

#define HALF_FORWARD(C, WORDS, PIXELS, BLOCKS)                                        \
  RR_KERNEL(THREADS, BLOCKS) forward_f16_c##C##_w##WORDS##_p##PIXELS(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                                   \
    Forward<C, WORDS, PIXELS>(a, *reinterpret_cast<Tile<C, WORDS, PIXELS>*>(raw)).run(); \
  }

#define SINGLE_FORWARD(C, WORDS)                                              \
  RR_KERNEL(THREADS, 1) forward_f32_c##C##_w##WORDS##_p32(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                           \
    SingleForward<C, WORDS>(a, raw).run();                                    \
  }

#define REDUCE(NAME, TYPE, C)                                       \
  RR_KERNEL(1024, 1) reduce_##NAME##_c##C(RR_PARAMETER(Arguments, a)) { \
    RR_SHARED(raw);                                                 \
    reduce<TYPE, C>(a, raw);                                        \
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
