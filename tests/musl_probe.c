/*
 * Asks a module through the libnsm.so of argv[1] under musl's own loader, and says a line for each answer: the status, and
 * what came back in hexadecimal. tests/test_built_wheels.py reads it.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX 12288 /* NSM_RESPONSE_MAX_SIZE */

static void *library;

static void *function(const char *name)
{
	void *found = dlsym(library, name);
	if (!found) {
		fprintf(stderr, "%s\n", dlerror());
		exit(1);
	}
	return found;
}

static void say(const char *name, int32_t status, const uint8_t *answer, size_t length)
{
	printf("%s %d ", name, status);
	for (size_t i = 0; i < length; i++)
		printf("%02x", answer[i]);
	printf("\n");
}

int main(int argc, char **argv)
{
	static uint8_t answer[MAX];
	size_t length;
	int32_t fd, status;

	library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
	if (!library) {
		fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "usage: musl_probe LIBRARY");
		return 1;
	}
	int32_t (*abi)(void) = function("nsmpy_abi_version");
	int32_t (*open)(void) = function("nsmpy_open");
	int32_t (*close)(int32_t) = function("nsmpy_close");
	int32_t (*describe)(int32_t, uint8_t *, size_t *) = function("nsmpy_describe");
	int32_t (*extend)(int32_t, uint32_t, const uint8_t *, size_t, uint8_t *, size_t *) = function("nsmpy_extend_pcr");
	int32_t (*lock)(int32_t, uint32_t) = function("nsmpy_lock_pcr");
	int32_t (*attest)(int32_t, const uint8_t *, size_t, const uint8_t *, size_t, const uint8_t *, size_t, uint8_t *,
			  size_t *) = function("nsmpy_attest");
	int32_t (*random)(int32_t, uint8_t *, size_t *) = function("nsmpy_random");

	say("abi", abi(), NULL, 0);
	fd = open();
	say("open", fd < 0 ? fd : 0, NULL, 0);
	length = MAX;
	status = describe(fd, answer, &length);
	say("describe", status, answer, status ? 0 : length);
	length = MAX;
	status = random(fd, answer, &length);
	say("random", status, answer, status ? 0 : length);
	length = MAX;
	status = extend(fd, 16, (const uint8_t *)"data", 4, answer, &length);
	say("extend", status, answer, status ? 0 : length);
	say("lock", lock(fd, 0), NULL, 0);
	length = 10;
	status = attest(fd, NULL, 0, (const uint8_t *)"nonce", 5, NULL, 0, answer, &length);
	printf("short %d %s\n", status, length > 10 ? "longer" : "not longer");
	length = MAX;
	status = attest(fd, NULL, 0, (const uint8_t *)"nonce", 5, NULL, 0, answer, &length);
	say("attest", status, answer, status ? 0 : length);
	say("close", close(fd), NULL, 0);
	say("closed", close(fd), NULL, 0);
	return 0;
}
