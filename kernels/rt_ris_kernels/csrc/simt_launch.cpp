// A kernel source (RT_RIS_SOURCE) as a shared library for the host; simt.py builds and calls it.
#define RT_RIS_SIMT
#include RT_RIS_SOURCE

namespace {

void enter() {
  simt::Block& block = simt::block();
  block.kernel(block.arguments);
  block.running->done = true;
  simt::yield();
}

void prepare(simt::Block& block, int threads, size_t shared_bytes) {
  block.size = {static_cast<unsigned>(threads), 1, 1};
  block.shared_bytes = shared_bytes;
  block.shared_storage.assign(shared_bytes + 16, 0xff);  // as f16 and float: not a number
  const size_t start = reinterpret_cast<size_t>(block.shared_storage.data());
  block.shared = block.shared_storage.data() + (16 - start % 16) % 16;
  block.touched.assign(shared_bytes / 2 + 1, simt::Touch());
  if (block.stacks.size() != threads * simt::STACK_BYTES)
    block.stacks.resize(threads * simt::STACK_BYTES);
  block.fibers.clear();
  block.warps.clear();
  for (int i = 0; i < threads; i++) {
    auto fiber = std::make_unique<simt::Fiber>();
    fiber->index = {static_cast<unsigned>(i), 0, 0};
    fiber->lane = i % 32;
    fiber->warp = i / 32;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = block.stacks.data() + i * simt::STACK_BYTES;
    fiber->context.uc_stack.ss_size = simt::STACK_BYTES;
    makecontext(&fiber->context, enter, 0);
    block.fibers.push_back(std::move(fiber));
  }
  for (int i = 0; i < threads / 32; i++) block.warps.push_back(std::make_unique<simt::Warp>());
}

// Runs a thread until it waits. False where it found a fault.
bool resume(simt::Block& block, simt::Fiber& fiber) {
  block.running = &fiber;
  const int why = _setjmp(block.scheduler);
  if (why) return why == 1;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
  return false;
}

long steps_of(const simt::Block& block, int warp) {
  long total = 0;
  for (int lane = 0; lane < 32; lane++) {
    const simt::Fiber& fiber = *block.fibers[warp * 32 + lane];
    total += fiber.operations + fiber.done + fiber.waits + fiber.started;
  }
  return total;
}

bool run_block(simt::Block& block) {
  const int warps = static_cast<int>(block.warps.size());
  for (;;) {
    bool finished = true;
    for (int warp = 0; warp < warps; warp++) {
      long before = -1;
      while (before != steps_of(block, warp)) {
        before = steps_of(block, warp);
        for (int lane = 0; lane < 32; lane++) {
          simt::Fiber& fiber = *block.fibers[warp * 32 + lane];
          if (!fiber.done && !fiber.waits && !resume(block, fiber)) return false;
        }
      }
      for (int lane = 0; lane < 32; lane++) {
        const simt::Fiber& fiber = *block.fibers[warp * 32 + lane];
        if (!fiber.done && !fiber.waits) {
          block.running = block.fibers[warp * 32 + lane].get();
          block.problem =
              "threads wait for each other: not all lanes reach an operation of their warp";
          return false;
        }
        finished = finished && fiber.done;
      }
    }
    if (finished) return true;
    for (auto& fiber : block.fibers)
      if (fiber->done) {
        block.problem = "threads wait at a barrier that others never reach";
        return false;
      }
    block.epoch++;
    for (auto& fiber : block.fibers) fiber->waits = false;
  }
}

std::string problem;

}  // namespace

extern "C" const char* simt_problem() { return problem.c_str(); }

extern "C" int simt_launch(void* kernel, const void* arguments, int grid_x, int grid_y, int threads,
                           long shared_bytes, int buffer_count, void** begins, const long* bytes,
                           const int* writable) {
  std::vector<simt::Buffer> buffers;
  for (int i = 0; i < buffer_count; i++)
    buffers.push_back({static_cast<unsigned char*>(begins[i]), static_cast<size_t>(bytes[i]),
                       writable[i] != 0,
                       std::vector<unsigned char>(writable[i] ? bytes[i] / 2 : 0)});
  simt::Block block;
  simt::block_pointer() = &block;
  block.buffers = &buffers;
  block.kernel = reinterpret_cast<void (*)(const void*)>(kernel);
  block.arguments = arguments;
  simt::half_table();
  for (int y = 0; y < grid_y; y++)
    for (int x = 0; x < grid_x; x++) {
      block.index = {static_cast<unsigned>(x), static_cast<unsigned>(y), 0};
      block.epoch = 0;
      prepare(block, threads, static_cast<size_t>(shared_bytes));
      if (!run_block(block)) {
        problem = block.problem;
        return 1;
      }
    }
  return 0;
}
