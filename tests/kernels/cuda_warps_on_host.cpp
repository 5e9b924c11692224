// Runs src/sere/kernels/reroute.cu on a CPU with real warps: every thread of every block is a fiber
// of one OS thread, 32 of them exchange values as a warp does, and all blocks run at once, so that
// those of a cluster can wait for each other. Fibers that may go on are taken in a random order, and
// some warps held back: a missing barrier shows as a wrong result.

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define ON_HOST
#define CLUSTER 1  // as in row_lanes.cuh
#ifndef JOINED
#define JOINED 0
#endif
#define __device__
#define __global__
#define __launch_bounds__(threads)

struct Index {
    unsigned x;
};

namespace host {
enum { STACK = 128 * 1024, WARP = 32 };

struct Meeting {  // of the threads that wait for each other
    int size = 0, arrived = 0;
    unsigned round = 0;
    unsigned long long told[2][WARP];
};
struct Block {
    std::map<const void*, std::shared_ptr<char[]>> shared;
    Meeting barrier;
    std::vector<Meeting> warps;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    unsigned block, thread;
    Meeting* waits = nullptr;
    unsigned round = 0;
    bool done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;
Meeting cluster;
Fiber* running;
ucontext_t scheduler;
std::function<void()> body;
std::mt19937 chance(0);

// Returns which of the two halves of `told` this round used.
unsigned meet(Meeting& meeting) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.round;
    } else {
        running->waits = &meeting;
        running->round = round;
        swapcontext(&running->context, &scheduler);
    }
    return round % 2;
}

void start() {
    body();
    running->done = true;
    swapcontext(&running->context, &scheduler);
}

// What a __shared__ variable of this block is.
template <class T>
T& shared_of(unsigned block, const void* name) {
    auto& memory = blocks[block].shared[name];
    if (!memory) {
        memory.reset(new char[sizeof(T)]);
        std::memset(memory.get(), 0xa5, sizeof(T));  // garbage, as on a GPU
    }
    return *reinterpret_cast<T*>(memory.get());
}
}  // namespace host

static struct {
    struct {
        operator unsigned() const { return host::running->thread; }
    } x;
} threadIdx;
static struct {
    struct {
        operator unsigned() const { return host::running->block; }
    } x;
} blockIdx;
static Index blockDim, gridDim;

#define SHARED(type, name)      \
    static char name##_of_all;  \
    type& name = host::shared_of<type>(host::running->block, &name##_of_all)

static void __syncthreads() { host::meet(host::blocks[host::running->block].barrier); }
static void __threadfence() {}
static void wait_for_the_kernel_before() {}
static void cluster_sync() { host::meet(host::cluster); }
static int cluster_blocks() { return gridDim.x; }
template <class T>
static T* in_block(T* own, int block) {
    if (JOINED != CLUSTER) return own;
    for (auto& [name, memory] : host::blocks[host::running->block].shared)
        if (memory.get() == reinterpret_cast<char*>(own)) return &host::shared_of<T>(block, name);
    return nullptr;
}

template <class T>
static T told(unsigned half, const host::Meeting& warp, int lane) {
    T value;
    std::memcpy(&value, &warp.told[half][lane], sizeof value);
    return value;
}
template <class T>
static std::pair<unsigned, host::Meeting*> tell(T value) {
    static_assert(sizeof value <= 8);
    host::Meeting& warp = host::blocks[host::running->block].warps[threadIdx.x / 32];
    std::memcpy(&warp.told[warp.round % 2][threadIdx.x % 32], &value, sizeof value);
    return {host::meet(warp), &warp};
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane, int width) {
    const auto [half, warp] = tell(value);
    const int first = threadIdx.x % 32 / width * width;
    return told<T>(half, *warp, first + (lane & (width - 1)));
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int other, int) {
    const auto [half, warp] = tell(value);
    return told<T>(half, *warp, threadIdx.x % 32 ^ other);
}
static unsigned __ballot_sync(unsigned, bool value) {
    const auto [half, warp] = tell(value);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(told<bool>(half, *warp, lane)) << lane;
    return bits;
}

#include "cuda_arithmetic_on_host.h"

template <class T>
static T atomicMin(T* where, T value) {
    return std::exchange(*where, std::min(*where, value));
}
template <class T>
static T atomicMax(T* where, T value) {
    return std::exchange(*where, std::max(*where, value));
}
template <class T>
static T atomicAdd(T* where, T value) {
    return std::exchange(*where, *where + value);
}
template <class T>
static T atomicOr(T* where, T value) {
    return std::exchange(*where, *where | value);
}
template <class T>
static T atomicAnd(T* where, T value) {
    return std::exchange(*where, *where & value);
}

#include "reroute.cu"

static void launch(int blocks, std::function<void()> kernel) {
    using namespace host;
    const int count = blocks * THREADS;
    host::blocks.assign(blocks, Block{});
    for (auto& block : host::blocks) {
        block.barrier.size = THREADS;
        block.warps.resize(THREADS / WARP);
        for (auto& warp : block.warps) warp.size = WARP;
    }
    cluster = Meeting{};
    cluster.size = count;
    blockDim.x = THREADS;
    gridDim.x = blocks;
    body = kernel;
    while ((int)fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
    std::vector<Fiber*> left;
    for (int i = 0; i < count; ++i) {
        Fiber& fiber = *fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
        fiber.context.uc_link = nullptr;
        fiber.block = i / THREADS;
        fiber.thread = i % THREADS;
        fiber.waits = nullptr;
        fiber.done = false;
        makecontext(&fiber.context, start, 0);
        left.push_back(&fiber);
    }
    unsigned held_back = 0, passes = 0;  // some warps, while others run ahead
    while (!left.empty()) {
        std::shuffle(left.begin(), left.end(), chance);
        if (passes-- == 0) {
            held_back = chance();
            passes = chance() % 128;
        }
        bool any = false;
        for (Fiber* fiber : left) {
            if (held_back >> (fiber->block * 7 + fiber->thread / WARP) % 32 & 1) continue;
            if (fiber->waits && fiber->waits->round == fiber->round) continue;
            fiber->waits = nullptr;
            running = fiber;
            any = true;
            swapcontext(&scheduler, &fiber->context);
        }
        if (!any) passes = 0;
        std::erase_if(left, [](Fiber* fiber) { return fiber->done; });
    }
}

// The arguments of a launch, in its order.
#if ROW_LANES
extern "C" void host_launch(int blocks, BATCH_PARAMETERS, int share, int* votes, DECISION_PARAMETERS) {
    launch(blocks, [=] {
        reroute_lanes(ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, K, E, share, votes,
                      neighbours, errors, scales, settings, pool, out, counters);
    });
}
#else
extern "C" void host_launch(int blocks, BATCH_PARAMETERS, DECISION_PARAMETERS) {
    launch(blocks, [=] {
        reroute_at_once(ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, K, E, neighbours,
                        errors, scales, settings, pool, out, counters);
    });
}
#endif
