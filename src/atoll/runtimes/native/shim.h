/* What the parts of the shim know of each other. */
#ifndef ATOLL_SHIM_H
#define ATOLL_SHIM_H

/* What the agent hands to the shim, and the shim to a tool whose process puts on its filter itself: descriptors one lower there. */
enum { NEWS = 3, PROGRAM = 4, WORDS = 5, FAILED = 125 };

/* See inside.c; the arguments are those after the word. Each returns an exit status. */
int start_lxc(char **argv);
int enter_instance(char **argv);
int become_first(void);
int become_filtered(void);

/* Returns whether the process that holds the other end of `pipe` became its command; if not, why goes to the file `log`. */
int became_command(int pipe, const char *log);

#endif
