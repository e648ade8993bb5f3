/* Lists of backends, and loading a plugin. The only file that names ref/ and ref/dense/. */
#include "registry.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

extern const xp_backend xp_ref_backend;
extern const xp_backend xp_dense_backend;

const xp_backend *const xp_backends[] = {&xp_ref_backend, &xp_dense_backend, NULL};

const xp_backend *xp_backend_ref(void) {
    return &xp_ref_backend;
}

const xp_backend *xp_backend_judge(const xp_backend *b) {
    return b == &xp_ref_backend ? &xp_dense_backend : &xp_ref_backend;
}

static int is_stage(const xp_stage *s) {
    for (int i = 0; xp_stages[i]; i++) {
        if (xp_stages[i] == s)
            return 1;
    }
    return 0;
}

static xp_status plugin_check(const char *path, const xp_backend *b) {
    if (!b)
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s: xp_plugin() returned NULL", path);
    if (b->abi != XP_ABI)
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s: abi %u, this program speaks %d", path, b->abi, XP_ABI);
    if (b->size != sizeof(xp_backend))
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s: size %u, expected %zu", path, b->size, sizeof(xp_backend));
    if (!b->name || !b->meaning || !b->kernel)
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s: name, meaning or kernel is NULL", path);
    for (int i = 0; xp_backends[i]; i++) {
        if (strcmp(b->name, xp_backends[i]->name) == 0)
            return XP_FAIL(XP_E_PLUGIN, "plugin: %s: the name '%s' is taken", path, b->name);
    }
    if (b->device && (b->device->abi != XP_ABI || b->device->size != sizeof(xp_device_ops)))
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s: device abi %u and size %u, expected %d and %zu", path, b->device->abi,
                       b->device->size, XP_ABI, sizeof(xp_device_ops));
    for (int i = 0; b->kernel[i]; i++) {
        const xp_kernel *k = b->kernel[i];
        if (!is_stage(k->stage) || !k->run || !k->name)
            return XP_FAIL(XP_E_PLUGIN, "plugin: %s: row %d has no known stage, no name or no run function", path, i);
    }
    return XP_OK;
}

/* A backend without a device of its own runs on the host's, which ref owns. Options are read by one thread. */
static const xp_backend *with_device(const xp_backend *b) {
    static xp_backend lent;
    if (b->device)
        return b;
    lent = *b;
    lent.device = xp_ref_backend.device;
    return &lent;
}

static xp_status plugin_open(const char *path, const xp_backend **out) {
    union {
        void *object;
        const xp_backend *(*function)(void);
    } symbol;
    if (!strchr(path, '/'))
        return XP_FAIL(XP_E_ARG, "impl: plugin path '%s' has no '/'; nothing is searched for", path);
    if (access(path, R_OK) != 0)
        return XP_FAIL(XP_E_IO, "plugin: %s: %s", path, strerror(errno));
    void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!so)
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s", dlerror());
    symbol.object = dlsym(so, "xp_plugin");
    if (!symbol.object) {
        dlclose(so);
        return XP_FAIL(XP_E_PLUGIN, "plugin: %s exports no xp_plugin", path);
    }
    const xp_backend *b = symbol.function();
    const xp_status st = plugin_check(path, b);
    if (st != XP_OK) {
        dlclose(so);
        return st;
    }
    *out = with_device(b);
    return XP_OK;
}

xp_status xp_backend_open(const char *name, const xp_backend **out) {
    *out = NULL;
    for (int i = 0; xp_backends[i]; i++) {
        if (strcmp(name, xp_backends[i]->name) == 0) {
            *out = with_device(xp_backends[i]);
            return XP_OK;
        }
    }
    if (strncmp(name, "plugin:", 7) == 0)
        return plugin_open(name + 7, out);
    return XP_FAIL(XP_E_ARG, "impl: '%s' is none of ref, dense, plugin:PATH", name);
}
