/* A libnvidia-ml.so.1 that reads its machine from the file FAKE_NVML_STATE names, anew on every call, so that the real
 * bindings and a running program see cards come, go, fill up and hang. The file has one fact per line:
 *   init CODE                   what nvmlInitWithFlags answers
 *   hang MILLISECONDS           every question about a card takes that long
 *   gpu INDEX CODE TOTAL USED UTILISATION TEMPERATURE MILLIWATTS LIMIT UUID NAME...
 *                               CODE other than 0 is the answer to every question; a figure of -1 is "not supported"
 *   process GPU KIND PID BYTES  KIND is c (compute) or g (graphics)
 *   silent 1                    the driver names no processes ("not supported")
 *   holds DIRECTORY             what engines hold: a file for each, named by its pid, with lines "GPU BYTES"; see
 *                               fake_gpus.py. The memory of one that ended is back, and its file gone,
 *   linger MILLISECONDS         so long after its end was first seen
 * Built with -DOLD_INIT it lacks nvmlInitWithFlags, with -DOLD_PROCESSES the version 3 process lists: older drivers. */

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, MAX_GPUS = 16, MAX_PROCESSES = 64 };

typedef struct { int present, code; long long total, used, load, temperature, power, limit; char uuid[96], name[96]; } Gpu;
typedef struct { unsigned gpu, pid; char kind; unsigned long long used; } Process;
typedef struct { int readable, init, hang_ms, silent, linger_ms; char holds[400]; unsigned gpus, processes; Gpu gpu[MAX_GPUS]; Process process[MAX_PROCESSES]; } State;

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } ProcessInfo;

static int initialised;
static char handles[MAX_GPUS]; /* a card's handle is the address of its place here */

static struct { int pid; long long seen_ms; } dead[MAX_PROCESSES]; /* engines that ended, and when that was seen */

static long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Whether the memory of an engine that has ended is back by now. */
static int is_back(int pid, int linger_ms)
{
    for (int i = 0; i < MAX_PROCESSES; i++) {
        if (dead[i].pid && dead[i].pid != pid)
            continue;
        if (!dead[i].pid) {
            dead[i].pid = pid;
            dead[i].seen_ms = now_ms();
        }
        return now_ms() - dead[i].seen_ms >= linger_ms;
    }
    return 1;
}

static void add_holds(State *state)
{
    DIR *directory = state->holds[0] ? opendir(state->holds) : NULL;
    if (!directory)
        return;
    struct dirent *entry;
    while ((entry = readdir(directory))) {
        int pid = atoi(entry->d_name), lives = pid > 0 && (kill(pid, 0) == 0 || errno == EPERM);
        char path[800], line[64];
        snprintf(path, sizeof path, "%s/%s", state->holds, entry->d_name);
        if (pid <= 0 || strchr(entry->d_name, '.'))
            continue;
        if (!lives && is_back(pid, state->linger_ms)) {
            unlink(path);
            continue;
        }
        FILE *file = fopen(path, "r");
        unsigned index;
        unsigned long long size;
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "%u %llu", &index, &size) == 2 && index < MAX_GPUS) {
                state->gpu[index].used += size;
                if (lives && state->processes < MAX_PROCESSES)
                    state->process[state->processes++] = (Process){index, pid, 'c', size};
            }
        if (file)
            fclose(file);
    }
    closedir(directory);
}

static void read_state(State *state)
{
    memset(state, 0, sizeof *state);
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return;
    state->readable = 1;
    char line[512];
    while (fgets(line, sizeof line, file)) {
        Gpu gpu = {.present = 1};
        Process process;
        unsigned index;
        if (sscanf(line, "init %d", &state->init) == 1 || sscanf(line, "hang %d", &state->hang_ms) == 1
            || sscanf(line, "silent %d", &state->silent) == 1 || sscanf(line, "linger %d", &state->linger_ms) == 1
            || sscanf(line, "holds %399[^\n]", state->holds) == 1)
            continue;
        if (sscanf(line, "gpu %u %d %lld %lld %lld %lld %lld %lld %95s %95[^\n]", &index, &gpu.code, &gpu.total, &gpu.used,
                   &gpu.load, &gpu.temperature, &gpu.power, &gpu.limit, gpu.uuid, gpu.name) == 10 && index < MAX_GPUS) {
            state->gpu[index] = gpu;
            if (index >= state->gpus)
                state->gpus = index + 1;
        } else if (sscanf(line, "process %u %c %u %llu", &process.gpu, &process.kind, &process.pid, &process.used) == 4
                   && state->processes < MAX_PROCESSES) {
            state->process[state->processes++] = process;
        }
    }
    fclose(file);
    add_holds(state);
}

static int look_up(void *handle, State *state, Gpu *gpu)
{
    long index = (char *)handle - handles;
    read_state(state);
    if (state->hang_ms) {
        struct timespec pause = {state->hang_ms / 1000, state->hang_ms % 1000 * 1000000L};
        nanosleep(&pause, NULL);
    }
    if (!initialised)
        return UNINITIALIZED;
    if (index < 0 || index >= MAX_GPUS || !state->gpu[index].present)
        return INVALID_ARGUMENT;
    *gpu = state->gpu[index];
    return gpu->code;
}

static int answer(void *handle, size_t field, unsigned *value)
{
    State state;
    Gpu gpu;
    int code = look_up(handle, &state, &gpu);
    if (code)
        return code;
    long long figure = *(long long *)((char *)&gpu + field);
    if (figure < 0)
        return NOT_SUPPORTED;
    *value = (unsigned)figure;
    return SUCCESS;
}

#ifndef OLD_INIT
int nvmlInitWithFlags(unsigned flags)
{
    State state;
    (void)flags;
    read_state(&state);
    if (!state.readable)
        return DRIVER_NOT_LOADED;
    if (state.init == SUCCESS)
        initialised = 1;
    return state.init;
}
#endif

int nvmlShutdown(void)
{
    int code = initialised ? SUCCESS : UNINITIALIZED;
    initialised = 0;
    return code;
}

const char *nvmlErrorString(int code)
{
    static char text[32];
    snprintf(text, sizeof text, "error number %d", code);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    State state;
    read_state(&state);
    *count = state.gpus;
    return initialised ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    State state;
    Gpu gpu;
    if (index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    *handle = handles + index;
    return look_up(*handle, &state, &gpu);
}

static int answer_text(void *handle, size_t field, char *text, unsigned size)
{
    State state;
    Gpu gpu;
    int code = look_up(handle, &state, &gpu);
    if (!code)
        snprintf(text, size, "%s", (char *)&gpu + field);
    return code;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size)
{
    return answer_text(handle, offsetof(Gpu, name), text, size);
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size)
{
    return answer_text(handle, offsetof(Gpu, uuid), text, size);
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory)
{
    State state;
    Gpu gpu;
    int code = look_up(handle, &state, &gpu);
    if (code)
        return code;
    if (gpu.total < 0)
        return NOT_SUPPORTED;
    memory->total = gpu.total;
    memory->used = gpu.used;
    memory->free = gpu.total - gpu.used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilization *rates)
{
    rates->memory = 0;
    return answer(handle, offsetof(Gpu, load), &rates->gpu);
}

int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius)
{
    (void)sensor;
    return answer(handle, offsetof(Gpu, temperature), celsius);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    return answer(handle, offsetof(Gpu, power), milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts)
{
    return answer(handle, offsetof(Gpu, limit), milliwatts);
}

static int list_processes(void *handle, char kind, unsigned *count, ProcessInfo *infos)
{
    State state;
    Gpu gpu;
    int code = look_up(handle, &state, &gpu);
    if (code)
        return code;
    if (state.silent)
        return NOT_SUPPORTED;
    unsigned room = infos ? *count : 0, found = 0;
    for (unsigned i = 0; i < state.processes; i++) {
        Process *process = &state.process[i];
        if (handles + process->gpu != (char *)handle || process->kind != kind)
            continue;
        if (found < room)
            infos[found] = (ProcessInfo){process->pid, process->used, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *infos)
{
    return list_processes(handle, 'c', count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *infos)
{
    return list_processes(handle, 'g', count, infos);
}

#ifndef OLD_PROCESSES
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos)
{
    return list_processes(handle, 'c', count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos)
{
    return list_processes(handle, 'g', count, infos);
}
#endif
