/* Compiles an OpenVINO IR for an Intel NPU with the compiler of OpenVINO's Windows wheel; runs under Wine.
 *
 *   npuc.exe MODEL.xml OUT.blob KEY=VALUE ...
 *
 * The twin of child.py: same arguments, prints `compile_s SECONDS`, exit status 1 with OpenVINO's message on stderr when
 * the model is rejected. openvino_c.dll and what it needs lie beside the program.
 */
#include <windows.h>
#include <stdio.h>
#include <string.h>

#define MAX_PROPERTIES 64

typedef struct { const char *key; const void *value; } property_t;

/* OpenVINO's threads are still there: returning from main would run their destructors, which may hang under Wine. */
static void leave(UINT code) {
    fflush(stdout);
    fflush(stderr);
    TerminateProcess(GetCurrentProcess(), code);
}

static FARPROC symbol(HMODULE library, const char *name) {
    FARPROC found = GetProcAddress(library, name);
    if (!found) {
        fprintf(stderr, "openvino_c.dll has no %s\n", name);
        leave(2);
    }
    return found;
}

static double seconds(void) {
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    return (double)now.QuadPart / (double)frequency.QuadPart;
}

int main(int argc, char **argv) {
    if (argc < 3 || argc - 3 > MAX_PROPERTIES) {
        fprintf(stderr, "usage: npuc.exe MODEL.xml OUT.blob KEY=VALUE ... (at most %d)\n", MAX_PROPERTIES);
        return 2;
    }
    property_t properties[MAX_PROPERTIES];
    for (int i = 3; i < argc; i++) {
        char *sign = strchr(argv[i], '=');
        if (!sign) {
            fprintf(stderr, "%s is not KEY=VALUE\n", argv[i]);
            return 2;
        }
        *sign = 0;
        properties[i - 3].key = argv[i];
        properties[i - 3].value = sign + 1;
    }

    HMODULE library = LoadLibraryA("openvino_c.dll");
    if (!library) {
        fprintf(stderr, "cannot load openvino_c.dll (error %lu)\n", GetLastError());
        return 2;
    }
    int (*create)(void **) = (void *)symbol(library, "ov_core_create");
    int (*read)(void *, const char *, const char *, void **) = (void *)symbol(library, "ov_core_read_model");
    int (*compile)(void *, void *, const char *, size_t, const property_t *, void **) =
        (void *)symbol(library, "ov_core_compile_model_props");
    int (*save)(void *, const char *) = (void *)symbol(library, "ov_compiled_model_export_model");
    const char *(*message)(void) = (void *)symbol(library, "ov_get_last_err_msg");

    void *core = NULL, *model = NULL, *compiled = NULL;
    int failed = create(&core) || read(core, argv[1], NULL, &model);
    double start = seconds();
    failed = failed || compile(core, model, "NPU", (size_t)(argc - 3), properties, &compiled);
    if (!failed) printf("compile_s %.3f\n", seconds() - start);
    failed = failed || save(compiled, argv[2]);
    if (failed) fprintf(stderr, "%s\n", message());
    leave(failed ? 1 : 0);
}
