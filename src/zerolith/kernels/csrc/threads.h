// Threads for one call. None outlives it, so a process may fork between any two calls, and none ever waits idle.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <atomic>

#include "tier.h"

namespace {

constexpr int MAX_THREADS = 256;
constexpr size_t STACK_BYTES = 512 * 1024;

template <class Body>
struct Work {
    Body& body;
    const Index num_chunks;
    std::atomic<Index> next{0};

    void run() {
        for (Index chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < num_chunks;) body(chunk);
    }
    static void* enter(void* work) {
        static_cast<Work*>(work)->run();
        return nullptr;
    }
};

// Calls body(chunk) once for each chunk, in `threads` threads, of which the caller is one; fewer if the system gives
// no more. They have the caller's floating-point mode and take no signals.
template <class Body>
void for_each_chunk(int threads, Index num_chunks, Body body) {
    Work<Body> work{body, num_chunks};
    Index wanted = threads < num_chunks ? threads : num_chunks;
    wanted = (wanted < MAX_THREADS ? wanted : MAX_THREADS) - 1;
    pthread_t helpers[MAX_THREADS];
    Index started = 0;
    if (wanted > 0) {
        sigset_t all, before;
        pthread_attr_t attributes;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        while (started < wanted && pthread_create(&helpers[started], &attributes, Work<Body>::enter, &work) == 0) {
            ++started;
        }
        pthread_attr_destroy(&attributes);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    work.run();
    for (Index helper = 0; helper < started; ++helper) pthread_join(helpers[helper], nullptr);
}

}  // namespace
