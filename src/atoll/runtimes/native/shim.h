/* What the parts of the shim know of each other. */
#ifndef ATOLL_SHIM_H
#define ATOLL_SHIM_H

enum { NEWS = 3, FAILED = 125 };

/* See inside.c; the arguments are those after the word. Each returns an exit status. */
int start_lxc(char **argv);
int enter_instance(char **argv);
int become_first(void);

#endif
