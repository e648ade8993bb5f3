/* What a family of models calls things in its config.json: one record a model_type, data only.
 *
 * A slot is a fact that the harness needs; the record says which key holds it, or that the family's class fixes it.
 * Adding a family is adding a row; the reader (config.c) has no branch on a family. */
#ifndef XP_FAMILIES_H
#define XP_FAMILIES_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    XP_SLOT_HIDDEN = 0, /* H */
    XP_SLOT_LAYERS,
    XP_SLOT_EXPERTS,      /* E */
    XP_SLOT_TOPK,         /* K */
    XP_SLOT_WIDTH,        /* F */
    XP_SLOT_SHARED,       /* S, or with a count the width of one shared expert */
    XP_SLOT_SHARED_COUNT, /* shared experts of that width, or else of an expert's: S = count * F; at least one where
                             the preset's router weighs them */
    XP_SLOT_LATENT,       /* width that the experts read and write, where it is not H */
    XP_SLOT_ROUTER_WIDTH, /* of the router's MLP, where the record has one */
    XP_SLOT_AROUND,       /* names of what is around the experts, as xp_around_parse() takes them */
    XP_SLOT_DENSE,        /* width of the layers without experts */
    XP_SLOT_STEP,         /* layer i is a MoE block when (i + 1) % step == 0 ... */
    XP_SLOT_DENSE_LAYERS, /* ... and i is not in this list */
    XP_SLOT_FIRST,        /* ... and i >= first */
    XP_SLOT_LAST,         /* ... and i <= last; -1: no limit */
    XP_SLOT_PERIOD,       /* ... and i % period == offset */
    XP_SLOT_OFFSET,
    XP_SLOT_LIST,   /* ... and i is in this list, when it is given */
    XP_SLOT_TYPES,  /* a word a layer: MoE blocks are those of the record's `sparse`; then FIRST is not looked at */
    XP_SLOT_NORM,   /* weights are divided by their sum */
    XP_SLOT_METHOD, /* a word that chooses the preset */
    XP_SLOT_PRESET, /* the preset's name itself */
    XP_SLOT_GROUPS, /* numbers of the dialect record, each in its own field */
    XP_SLOT_TOPK_GROUPS,
    XP_SLOT_SCALE,
    XP_SLOT_NULLS,
    XP_SLOT_LIMIT,
    XP_SLOT_LIMITS,        /* a limit a layer, of the experts ... */
    XP_SLOT_LIMITS_SHARED, /* ... and of the shared expert; null or 0: none */
    XP_SLOT_FURTHER,       /* layers after the last one that a list a layer may speak of, too */
    XP_SLOT_HASH,          /* the first so many layers have the family's preset `other` */
    XP_SLOT_ALPHA,
    XP_SLOT_LOGIT_SCALE, /* factor of the router's logits */
    XP_SLOT_SOFTCAP,     /* of the router's logits; 0: none */
    XP_SLOT_GATE_CAP,
    XP_SLOT_UP_CAP,
    XP_SLOT_COMBINE, /* "sum" or "average" of the routed and the shared output */
    XP_SLOT_SUM_EPS,
    XP_SLOT_MARGIN,
    XP_SLOT_CAPACITY,    /* slots that an expert takes */
    XP_SLOT_ROUTER_BIAS, /* whether the router has a bias */
    XP_SLOT_SELECT_BIAS, /* whether there is a selection bias */
    XP_SLOT_ACT,         /* activation of the experts */
    XP_SLOT_JITTER,      /* noise on the block's input */
    XP_SLOT_EPS,         /* of RMSNorm */
    XP_SLOT_EXPERT_EPS,  /* of the norm of the experts' output rows */
    XP_SLOT_AUX,         /* coefficient of the balance loss */
    XP_SLOT_Z,           /* coefficient of the z loss */
    XP_SLOT_VOCAB,
    XP_SLOT_DTYPE, /* of the published weights */
    XP_NSLOT
} xp_slot;

typedef enum {
    XP_SLOT_NONE = 0, /* the family has no such thing: 0 */
    XP_SLOT_KEY,      /* a key that must be there */
    XP_SLOT_OPTIONAL, /* a key; absent or null means `value`, which is reported, with `why` */
    XP_SLOT_FIXED     /* the class fixes it to `value` */
} xp_slot_from;

typedef struct {
    xp_slot_from from;
    const char *keys; /* aliases, '|' between them, the published one first */
    double value;
    const char *why; /* why the value may be taken without a key */
} xp_slot_source;

typedef struct {
    const char *model_type;
    const char *arch;      /* what names in `architectures` begin with */
    const char *preset[2]; /* dialect presets: without and with renormalised weights, or one for each word of methods */
    const char *methods;   /* words of XP_SLOT_METHOD; NULL: the slot chooses nothing */
    const char *inside;    /* key of the object that holds the fields, "a.b" for one in another; '|' between those of
                              which the first that is there does, "." for the file's own; NULL: the file's own */
    const char *text;      /* model_type of files that are that object alone; NULL: none of these is read */
    const char *sparse;    /* words of XP_SLOT_TYPES that mean a MoE block, '|' between them; with a word of one letter
                              the files may have a text with a letter a layer, with "1" a list of 0 and 1 */
    const char *other;     /* preset of the layers whose word of XP_SLOT_TYPES is `other_word`, or of the first
                              XP_SLOT_HASH ones; its numbers are the file's, too. NULL: all blocks are alike */
    const char *other_word;
    int list_text;    /* 1: XP_SLOT_LIST may be a text, numbers with commas between them */
    const char *act;  /* what XP_SLOT_ACT must say, '|' between names of one function; NULL: silu */
    const char *note; /* what the step leaves out of this family's block; NULL: nothing */
    xp_slot_source slot[XP_NSLOT];
    const char *dense_instead; /* a key that, where a file has it, gives XP_SLOT_DENSE; the name of that slot is then
                                  one of XP_SLOT_WIDTH. NULL: none */
    const char *only;    /* "key=1,null|...": JSON values that a key may have when it is there; others are not built.
                            "+key=...": it must be there */
    int groups_or_none;  /* 1: XP_SLOT_GROUPS and XP_SLOT_TOPK_GROUPS are given both or neither; without them there are
                            no groups, which the second of two methods must have */
    const char *refused; /* what of the family is not built, beginning with the fields that speak of it: no file of it
                            is read, and no other member counts. NULL: files are read */
    unsigned around;     /* XP_LATENT_NORM ...: what the class has around its experts */
    const char *unread;  /* keys, '|' between them, whose names speak of routing and that may be left unread */
} xp_family;

/* Ends with a NULL model_type. */
extern const xp_family xp_families[];

#ifdef __cplusplus
}
#endif
#endif
