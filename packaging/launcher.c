/*
 * The head of the one file: unpacks what is appended to it, once, and runs it.
 *
 * The file is  this program | payload (zstd of a tar) | trailer.  The payload goes to
 * bundle-KEY in the first folder that may hold it: private, executable, with room. KEY
 * is the payload's digest, so a folder of that name, which appears by a rename when it
 * is whole, is never stale. Linked statically: it needs nothing of the host.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zstd.h>

#define KEY 32
#define DRAFT ".bundle-"
#define BLOCK 512
#define PYTHON "bin/python3.9"
#define PLACE 256
#define LOADER_ROOM 200 /* packaging/bundle.py makes the loader's name in python as long */

struct trailer {
	uint64_t packed, unpacked; /* bytes */
	char key[KEY];
	char magic[16];
};
static const char MAGIC[16] = "ctrace-bundle-1";

struct stream {
	int fd;
	uint64_t left; /* packed bytes still in the file */
	int whole;     /* the end was reached, and its checksum is right */
	ZSTD_DStream *zstd;
	ZSTD_inBuffer in;
	char chunk[1 << 17];
};

static _Noreturn void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("ctrace: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	exit(1);
}

/* Exactly `size` bytes of the tar; -1 when the file is damaged. */
static int get(struct stream *from, void *into, size_t size)
{
	ZSTD_outBuffer out = {into, size, 0};
	size_t hint;

	while (out.pos < size) {
		if (from->in.pos == from->in.size) {
			size_t want = from->left < sizeof(from->chunk) ? from->left : sizeof(from->chunk);
			ssize_t got = want ? read(from->fd, from->chunk, want) : 0;

			if (got <= 0)
				return -1;
			from->left -= got;
			from->in = (ZSTD_inBuffer){from->chunk, got, 0};
		}
		hint = ZSTD_decompressStream(from->zstd, &out, &from->in);
		from->whole = hint == 0;
		if (ZSTD_isError(hint))
			return -1;
	}
	return 0;
}

static int put(int folder, const char *name, const char *data, size_t size, mode_t mode)
{
	int fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);

	if (fd < 0)
		return -1;
	while (size) {
		ssize_t done = write(fd, data, size);

		if (done < 0) {
			close(fd);
			return -1;
		}
		data += done;
		size -= done;
	}
	return close(fd);
}

/* Python's ELF header names its loader, and room was left for the name that it has here. */
static void name_loader(char *program, size_t size, const char *loader)
{
	char room[LOADER_ROOM + 1];
	char *place;

	memset(room, '#', LOADER_ROOM);
	room[LOADER_ROOM] = 0;
	place = memmem(program, size, room, LOADER_ROOM);
	if (!place)
		fail("this file is damaged: make or copy it again");
	memset(place, 0, LOADER_ROOM);
	strcpy(place, loader);
}

/* -1 with errno: what stands in the way; EBADMSG for a damaged file. */
static int unpack(struct stream *from, int folder, const char *loader)
{
	char header[BLOCK];

	for (;;) {
		char name[101] = "";
		size_t size, padded;
		char *data;
		int done;

		if (get(from, header, BLOCK))
			return errno = EBADMSG, -1;
		if (!header[0]) { /* the checksum of all stands at the end */
			while (!get(from, header, BLOCK))
				;
			return from->whole ? 0 : (errno = EBADMSG, -1);
		}
		memcpy(name, header, 100);
		size = strtoull(header + 124, NULL, 8);
		if (header[156] == '5') {
			if (mkdirat(folder, name, 0700))
				return -1;
			continue;
		}
		padded = (size + BLOCK - 1) / BLOCK * BLOCK;
		data = malloc(padded + 1);
		if (!data)
			return -1;
		if (get(from, data, padded))
			return free(data), errno = EBADMSG, -1;
		if (!strcmp(name, PYTHON))
			name_loader(data, size, loader);
		done = put(folder, name, data, size, strtoul(header + 100, NULL, 8) & 0700);
		free(data);
		if (done)
			return -1;
	}
}

/* Takes a half made folder away again. */
static void sweep(int parent, const char *name)
{
	int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *folder = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;

	while (folder && (entry = readdir(folder))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (unlinkat(dirfd(folder), entry->d_name, 0) && (errno == EISDIR || errno == EPERM))
			sweep(dirfd(folder), entry->d_name);
	}
	if (folder)
		closedir(folder);
	unlinkat(parent, name, AT_REMOVEDIR);
}

/* What others made half of and were killed over; the caller has the folder's lock. */
static void sweep_left(int folder)
{
	int copy = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *all = copy < 0 ? NULL : fdopendir(copy);
	struct dirent *entry;

	while (all && (entry = readdir(all)))
		if (!strncmp(entry->d_name, DRAFT, strlen(DRAFT)))
			sweep(folder, entry->d_name);
	if (all)
		closedir(all);
}

/* One process unpacks at a time, and the lock goes with it. One that stands still is not waited
 * for: then two unpack, and nothing is swept. */
static void take_turn(int folder)
{
	for (int tries = 0; tries < 100; tries++) {
		if (!flock(folder, LOCK_EX | LOCK_NB))
			return sweep_left(folder);
		if (errno != EWOULDBLOCK)
			return;
		usleep(100000);
	}
}

/* A folder that is ours alone to write; -1 with `why`. */
static int private_folder(const char *path, char *why, size_t size)
{
	struct stat is;
	int fd;

	if (mkdir(path, 0700) && errno != EEXIST) {
		snprintf(why, size, "%s: %s", path, strerror(errno));
		return -1;
	}
	fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd >= 0 && !fstat(fd, &is) && is.st_uid == geteuid() && !(is.st_mode & 022))
		return fd;
	snprintf(why, size, "%s: others may write there", path);
	if (fd >= 0)
		close(fd);
	return -1;
}

/* 0 when bundle-KEY is there, whole, below `path`. */
static int offer(const char *path, struct stream *from, const struct trailer *trailer,
		 char *why, size_t size)
{
	char name[KEY + 16], draft[KEY + 40], loader[PATH_MAX];
	struct statvfs disk;
	int folder, inner, bad, damaged;

	folder = private_folder(path, why, size);
	if (folder < 0)
		return -1;
	snprintf(name, sizeof(name), "bundle-%.*s", KEY, trailer->key);
	snprintf(draft, sizeof(draft), DRAFT "%.*s.%d", KEY, trailer->key, (int)getpid());
	snprintf(loader, sizeof(loader), "%s/%s/lib/ld.so", path, name);
	bad = -1;
	if (faccessat(folder, name, X_OK, 0))
		take_turn(folder);
	if (fstatvfs(folder, &disk))
		snprintf(why, size, "%s: %s", path, strerror(errno));
	else if (disk.f_flag & ST_NOEXEC)
		snprintf(why, size, "%s: mounted noexec", path);
	else if (strlen(loader) >= LOADER_ROOM)
		snprintf(why, size, "%s: the name is too long", path);
	else if (!faccessat(folder, name, X_OK, 0))
		bad = 0;
	else if (disk.f_flag & ST_RDONLY)
		snprintf(why, size, "%s: read-only", path);
	else if ((uint64_t)disk.f_bavail * disk.f_frsize < trailer->unpacked)
		snprintf(why, size, "%s: less than %llu MB free", path,
			 (unsigned long long)(trailer->unpacked >> 20) + 1);
	else if (mkdirat(folder, draft, 0700))
		snprintf(why, size, "%s: %s", path, strerror(errno));
	else {
		inner = openat(folder, draft, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		bad = inner < 0 ? -1 : unpack(from, inner, loader);
		/* another process may have been as quick */
		if (!bad && renameat(folder, draft, folder, name) && errno != ENOTEMPTY && errno != EEXIST)
			bad = -1;
		damaged = bad && errno == EBADMSG;
		if (bad)
			snprintf(why, size, "%s: %s", path, strerror(errno));
		sweep(folder, draft);
		if (damaged) /* no other place will do */
			fail("this file is damaged: copy it again");
		if (inner >= 0)
			close(inner);
	}
	close(folder);
	return bad;
}

static int open_self(void)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	if (fd < 0) /* no /proc here */
		fd = open((const char *)getauxval(AT_EXECFN), O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail("this file cannot be read: %s", strerror(errno));
	return fd;
}

static void rewind_stream(struct stream *from, const struct trailer *trailer)
{
	lseek(from->fd, -(off_t)(sizeof(*trailer) + trailer->packed), SEEK_END);
	from->left = trailer->packed;
	from->whole = 0;
	from->in = (ZSTD_inBuffer){from->chunk, 0, 0};
	ZSTD_initDStream(from->zstd);
}

static _Noreturn void run(const char *folder, const struct trailer *trailer, int count, char **given)
{
	static const char *head[] = {"", "-I", "-S", "-m", "ctrace"};
	char **arguments = calloc(count + 6, sizeof(char *));
	char python[PATH_MAX];

	/* python finds its libraries by it, and nothing is seen of the host without it */
	if (access("/proc/self/exe", F_OK))
		fail("/proc is not mounted here: mount -t proc proc /proc");
	snprintf(python, sizeof(python), "%s/bundle-%.*s/" PYTHON, folder, KEY, trailer->key);
	memcpy(arguments, head, sizeof(head));
	arguments[0] = python;
	memcpy(arguments + 5, given + 1, (count - 1) * sizeof(char *));
	execv(python, arguments);
	fail("cannot run %s: %s", python, strerror(errno));
}

int main(int count, char **given)
{
	static struct stream from;
	struct trailer trailer;
	char places[4][PLACE], why[8 * PLACE] = "", one[2 * PLACE];
	const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
	mode_t mask;
	int n = 0;

	mask = umask(077);
	if (!geteuid()) { /* what root runs is not for a variable to say */
		strcpy(places[n++], "/var/cache/ctrace");
		strcpy(places[n++], "/run/ctrace");
	} else if (cache && *cache == '/')
		snprintf(places[n++], PLACE, "%s/ctrace", cache);
	else if (home && *home == '/') {
		snprintf(places[n], PLACE, "%s/.cache", home);
		mkdir(places[n], 0700);
		snprintf(places[n++], PLACE, "%s/.cache/ctrace", home);
	}
	snprintf(places[n++], PLACE, "/dev/shm/ctrace-%d", (int)geteuid());
	snprintf(places[n++], PLACE, "/tmp/ctrace-%d", (int)geteuid());

	from.fd = open_self();
	from.zstd = ZSTD_createDStream();
	if (lseek(from.fd, -(off_t)sizeof(trailer), SEEK_END) < 0 ||
	    read(from.fd, &trailer, sizeof(trailer)) != sizeof(trailer) ||
	    memcmp(trailer.magic, MAGIC, sizeof(MAGIC)))
		fail("this file is not whole: copy it again");
	for (int i = 0; i < n; i++) {
		rewind_stream(&from, &trailer);
		if (!offer(places[i], &from, &trailer, one, sizeof(one))) {
			umask(mask);
			run(places[i], &trailer, count, given);
		}
		if (strlen(why) + strlen(one) + 3 < sizeof(why))
			sprintf(why + strlen(why), "%s%s", *why ? "; " : "", one);
	}
	fail("no folder to unpack into (%s): make one, for example with "
	     "mount -t tmpfs -o mode=0755 tmpfs /var/cache", why);
}
