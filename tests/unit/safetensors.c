/* The reader and the writer of safetensors files: every rule is broken once and refused by name; what is written has
 * the bytes that safetensors 0.8.0 itself gives; a file cut or changed anywhere is an error and nothing worse. */
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/expar-safetensors-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void has(const char *part) {
    if (!strstr(xp_error_text(), part))
        fail_msg("expected '%s' in: %s", part, xp_error_text());
}

/* ---- files made by hand ---- */

typedef struct {
    unsigned char *bytes; /* of exactly that size, for the sanitizers */
    size_t n;
} file;

/* length, header as it is, `data` bytes that count up. */
static file make_as(uint64_t length, const char *header, size_t header_bytes, size_t data) {
    file f;
    f.n = 8 + header_bytes + data;
    f.bytes = malloc(f.n);
    assert_non_null(f.bytes);
    for (int i = 0; i < 8; i++)
        f.bytes[i] = (unsigned char)(length >> (8 * i));
    memcpy(f.bytes + 8, header, header_bytes);
    for (size_t i = 0; i < data; i++)
        f.bytes[8 + header_bytes + i] = (unsigned char)i;
    return f;
}

static xp_status parse(const char *header, size_t data, xp_safetensors **out) {
    static file last; /* the tensors are read from it later */
    free(last.bytes);
    last = make_as(strlen(header), header, strlen(header), data);
    return xp_safetensors_parse(last.bytes, last.n, "f", out);
}

static void taken(const char *header, size_t data) {
    xp_safetensors *st;
    if (parse(header, data, &st) != XP_OK)
        fail_msg("%s: %s", header, xp_error_text());
    assert_non_null(st);
    xp_safetensors_close(st);
}

static void refused(const char *header, size_t data, const char *text) {
    xp_safetensors *st = (xp_safetensors *)(void *)folder;
    if (parse(header, data, &st) != XP_E_FORMAT)
        fail_msg("not refused: %s", header);
    assert_null(st);
    has("f: ");
    has(text);
}

/* ---- rules ---- */

static void values_are_read(void **state) {
    (void)state;
    xp_safetensors *st;
    xp_tensor t;
    const char *key, *value;
    assert_int_equal(
        parse("{ \"__metadata__\" : {\"b\":\"2\",\"a\":\"\\u00e9\\n\"},\n\"late\":{\"shape\":[2,1],\"dtype\":\"I32\","
              "\"data_offsets\":[5,13]},\t\"x\\\"\\/\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[0,5]}}  ",
              13, &st),
        XP_OK);
    assert_int_equal(xp_safetensors_count(st), 2);
    assert_string_equal(xp_safetensors_metadata(st, "a"), "\xc3\xa9\n");
    assert_string_equal(xp_safetensors_metadata(st, "b"), "2");
    assert_null(xp_safetensors_metadata(st, "c"));
    assert_int_equal(xp_safetensors_pair(st, 0, &key, &value), 1);
    assert_string_equal(key, "a");
    assert_int_equal(xp_safetensors_pair(st, 2, &key, &value), 0);
    assert_int_equal(xp_safetensors_pair(st, -1, &key, &value), 0);
    /* in the order of the data */
    assert_string_equal(xp_safetensors_at(st, 0)->name, "x\"/");
    assert_int_equal(xp_safetensors_find(st, "x\"/"), 0);
    assert_int_equal(xp_safetensors_find(st, "late"), 1);
    assert_int_equal(xp_safetensors_find(st, "lat"), -1);
    assert_int_equal(xp_safetensors_find(st, ""), -1);
    const xp_safetensors_info *late = xp_safetensors_at(st, 1);
    assert_string_equal(late->spell, "I32");
    assert_int_equal(late->ndim, 2);
    assert_int_equal(late->dim[0], 2);
    assert_int_equal(late->dim[1], 1);
    assert_int_equal(late->count, 2);
    assert_int_equal(late->begin, 5);
    assert_int_equal(late->end, 13);
    /* its data begins at an odd byte of the file, the view does not */
    assert_int_equal(xp_safetensors_view(st, 1, &t), XP_OK);
    assert_int_equal((uintptr_t)t.data % 8, 0);
    assert_int_equal(t.dtype, XP_I32);
    assert_int_equal(t.ndim, 2);
    assert_true(xp_widen(t.data, XP_I32, 1) == (double)0x0c0b0a09);
    void *data;
    assert_int_equal(xp_safetensors_data(st, 1, &data), XP_OK);
    assert_ptr_equal(data, t.data);
    xp_safetensors_close(st);
    xp_safetensors_close(NULL);
}

static void every_dtype(void **state) {
    (void)state;
    static const struct {
        const char *spell;
        int elements, bytes;
        xp_dtype ours;
    } row[] = {
        {"BOOL", 3, 3, XP_NDTYPE},
        {"F4", 6, 3, XP_E2M1},
        {"F6_E2M3", 4, 3, XP_NDTYPE},
        {"F6_E3M2", 4, 3, XP_NDTYPE},
        {"U8", 3, 3, XP_U8},
        {"I8", 3, 3, XP_NDTYPE},
        {"F8_E5M2", 3, 3, XP_E5M2},
        {"F8_E4M3", 3, 3, XP_E4M3},
        {"F8_E8M0", 3, 3, XP_E8M0},
        {"F8_E4M3FNUZ", 3, 3, XP_E4M3FNUZ},
        {"F8_E5M2FNUZ", 3, 3, XP_E5M2FNUZ},
        {"I16", 3, 6, XP_NDTYPE},
        {"U16", 3, 6, XP_NDTYPE},
        {"F16", 3, 6, XP_F16},
        {"BF16", 3, 6, XP_BF16},
        {"I32", 3, 12, XP_I32},
        {"U32", 3, 12, XP_NDTYPE},
        {"F32", 3, 12, XP_F32},
        {"C64", 3, 24, XP_NDTYPE},
        {"F64", 3, 24, XP_F64},
        {"I64", 3, 24, XP_I64},
        {"U64", 3, 24, XP_U64},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        xp_safetensors *st;
        xp_tensor t;
        char header[160], text[80];
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%d]}}",
                 row[i].spell, row[i].elements, row[i].bytes);
        assert_int_equal(parse(header, (size_t)row[i].bytes, &st), XP_OK);
        assert_int_equal(xp_safetensors_at(st, 0)->dtype, row[i].ours);
        if (row[i].ours == XP_NDTYPE) {
            assert_int_equal(xp_safetensors_view(st, 0, &t), XP_E_FORMAT);
            snprintf(text, sizeof text, "f: tensor 'a': dtype is %s, expected one of F64", row[i].spell);
            has(text);
            assert_null(t.data);
        } else {
            assert_int_equal(xp_safetensors_view(st, 0, &t), XP_OK);
            assert_int_equal(t.dtype, row[i].ours);
            assert_int_equal(xp_dtype_bytes(t.dtype, xp_tensor_count(&t)), row[i].bytes);
            assert_int_equal(((unsigned char *)t.data)[2], 2);
        }
        xp_safetensors_close(st);
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%d]}}",
                 row[i].spell, row[i].elements, row[i].bytes + 1);
        snprintf(text, sizeof text, "%d bytes, expected %d for %d elements of %s", row[i].bytes + 1, row[i].bytes,
                 row[i].elements, row[i].spell);
        refused(header, (size_t)row[i].bytes + 1, text);
    }
    refused("{\"a\":{\"dtype\":\"f32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4,
            "tensor 'a': dtype is 'f32', expected one of BOOL F4");
    refused("{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]}}", 2,
            "tensor 'a': shape has 3 elements of 4 bits (F4), expected a whole number of bytes");
    refused("{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2, "2 elements of 6 bits");
}

static void shapes(void **state) {
    (void)state;
    xp_safetensors *st;
    xp_tensor t;
    taken("{}", 0);
    taken("{}      ", 0);
    taken("{\"__metadata__\":{}}", 0);
    taken("{\"\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1);
    /* no elements: still there, with a view that is not absent */
    assert_int_equal(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,9007199254740992],\"data_offsets\":[0,0]},"
                           "\"b\":{\"dtype\":\"F32\",\"shape\":[3,0],\"data_offsets\":[0,0]},"
                           "\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                           1, &st),
                     XP_OK);
    assert_int_equal(xp_safetensors_count(st), 3);
    assert_int_equal(xp_safetensors_view(st, 0, &t), XP_OK);
    assert_non_null(t.data);
    assert_int_equal(xp_tensor_count(&t), 0);
    assert_int_equal(t.dim[1], (int64_t)1 << 53);
    xp_safetensors_close(st);
    assert_int_equal(parse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,2],\"data_offsets\":[0,2]}}", 2, &st), XP_OK);
    assert_int_equal(xp_safetensors_at(st, 0)->ndim, 5);
    assert_int_equal(xp_safetensors_at(st, 0)->dim[4], 2);
    assert_int_equal(xp_safetensors_view(st, 0, &t), XP_E_FORMAT);
    has("f: tensor 'a': shape has 5 dimensions, expected at most 4");
    xp_safetensors_close(st);
}

static void overflow(void **state) {
    (void)state;
#define SHAPE(dtype, s) "{\"a\":{\"dtype\":\"" dtype "\",\"shape\":[" s "],\"data_offsets\":[0,0]}}"
    refused(SHAPE("F64", "4294967296,4294967296"), 0,
            "tensor 'a': shape[1] is 4294967296: the product of the shape overflows");
    refused(SHAPE("U8", "4294967296,4294967296,0"), 0, "shape[1] is 4294967296: the product of the shape overflows");
    refused(SHAPE("U8", "0,4294967296,4294967296"), 0, "shape[2] is 4294967296: the product of the shape overflows");
    /* 2^57 elements of 64 bits are 2^63 bits, one more than is counted; fewer are counted, and are not in the file */
    refused(SHAPE("F64", "16,9007199254740992"), 0,
            "product of the shape overflows, expected at most 144115188075855871");
    refused(SHAPE("F64", "15,9007199254740992"), 0, "0 bytes, expected 1080863910568919040 for");
    refused(SHAPE("U8", "9007199254740993"), 0,
            "shape[0] is 9007199254740993, expected digits alone, a number from 0 to 9007199254740992");
    refused(SHAPE("U8", "18446744073709551616"), 0, "shape[0] is 18446744073709551616, expected");
    refused(SHAPE("U8", "99999999999999999999999999999999999999999999999999999999999"), 0, "shape[0] is 9999");
}

static void numbers(void **state) {
    (void)state;
    static const char *const bad[] = {"1.0", "1e0",  "1E0",  "-1",    "-0",  "+1", "01", "00",
                                      "0x1", "true", "null", "\"1\"", "NaN", "[1", "{",  ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char header[160], text[80];
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,%s],\"data_offsets\":[0,1]}}", bad[i]);
        snprintf(text, sizeof text, "tensor 'a': shape[1] is %s", bad[i]);
        refused(header, 1, text);
        has(", expected digits alone");
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,%s]}}", bad[i]);
        snprintf(text, sizeof text, "tensor 'a': data_offsets[1] is %s", bad[i]);
        refused(header, 1, text);
    }
    taken("{\"a\":{\"dtype\":\"U8\",\"shape\":[ 1 , 1 ],\"data_offsets\":[ 0 , 1 ]}}", 1);
}

#define A "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}"

static void fields(void **state) {
    (void)state;
    refused("{" A "," A "}", 1, "f: tensor 'a' is given twice");
    refused("{" A ",\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[1,1]}}", 1,
            "tensor 'a' is given twice");
    refused("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
            "tensor 'a': field 'dtype' is given twice");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
            "field 'shape' is given twice");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"extra\":{}}}", 1,
            "tensor 'a': field 'extra' is unknown");
    refused("{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor 'a': no field 'dtype'");
    refused("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor 'a': no field 'shape'");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor 'a': no field 'data_offsets'");
    refused("{\"a\":{\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
            "tensor 'a': header byte 14: '8', expected dtype, a text");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "expected '[' of shape");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1,
            "expected ',' between the two numbers of data_offsets");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,1]}}", 1,
            "expected ']' after the two numbers of data_offsets");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":{}}}", 1, "expected '[' of data_offsets");
    refused("{\"a\":null}", 0, "tensor 'a': header byte 5: 'n', expected '{'");
    refused("{\"a\":{}}", 0, "expected a field's name");
    refused("{\"a\":{\"b\":{\"c\":{\"d\":{\"e\":1}}}}}", 0, "field 'b' is unknown");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[[1]],\"data_offsets\":[0,1]}}", 1, "shape[0] is [1");
}

static void offsets(void **state) {
    (void)state;
#define AT(name, n, from, to) "\"" name "\":{\"dtype\":\"U8\",\"shape\":[" #n "],\"data_offsets\":[" #from "," #to "]}"
    taken("{" AT("b", 1, 1, 2) "," AT("a", 1, 0, 1) "}", 2);
    refused("{" AT("a", 1, 0, 1) "," AT("b", 1, 2, 3) "}", 3,
            "tensor 'b': data_offsets are [2,3], expected to begin at 1 where 'a' ends (no holes)");
    refused("{" AT("a", 2, 0, 2) "," AT("b", 2, 1, 3) "}", 3,
            "tensor 'b': data_offsets are [1,3], expected to begin at 2 where 'a' ends (no overlap)");
    refused("{" AT("a", 1, 0, 1) "," AT("b", 1, 0, 1) "}", 1,
            "tensor 'b': data_offsets are [0,1], expected to begin at 1 where 'a' ends (no overlap)");
    refused("{" AT("a", 1, 1, 2) "}", 2,
            "tensor 'a': data_offsets are [1,2], expected to begin at 0 where 'the header' ends (no holes)");
    refused("{" AT("a", 1, 1, 0) "}", 1,
            "tensor 'a': data_offsets are [1,0], expected an end that is not before the begin");
    refused("{" AT("a", 2, 0, 1) "}", 1,
            "tensor 'a': data_offsets are [0,1], 1 bytes, expected 2 for 2 elements of U8");
    refused("{" AT("a", 2, 0, 2) "}", 1, "tensor 'a': data_offsets are [0,2], but 1 bytes follow the header");
    refused("{" AT("a", 1, 0, 1) "}", 2, "f: 2 bytes follow the header, expected 1, where the last tensor 'a' ends");
    refused("{}", 1, "f: 1 bytes follow the header, expected 0");
    refused("{" AT("a", 0, 0, 0) "," AT("b", 1, 0, 1) "," AT("c", 0, 0, 0) "," AT("d", 0, 5, 5) "}", 1,
            "tensor 'd': data_offsets are [5,5], but 1 bytes");
}

static void header_form(void **state) {
    (void)state;
    refused("", 0, "header byte 0: the header's end, expected '{'");
    refused(" {}", 0,
            "header byte 0: ' ', expected '{': the header begins with its object, with no space or byte order mark");
    refused("\xef\xbb\xbf{}", 0, "header byte 0: byte 0xef, expected '{'");
    refused("[]", 0, "header byte 0: '[', expected '{'");
    refused("{}x", 0, "header byte 2: 'x', expected nothing but spaces after the object");
    refused("{}\n", 0, "header byte 2: byte 0x0a, expected nothing but spaces");
    refused("{}{}", 0, "expected nothing but spaces");
    refused("{", 0, "header byte 1: the header's end, expected the name of a tensor");
    refused("{" A ",}", 1, "expected the name of a tensor");
    refused("{" A " " A "}", 1, "expected ',' or '}' after a tensor");
    refused("{\"a\"}", 0, "expected ':' after a tensor's name");
    refused("{a:1}", 0, "expected the name of a tensor");
    refused("{'a':1}", 0, "expected the name of a tensor");
    refused("{/**/}", 0, "expected the name of a tensor");
    file f = make_as(3, "{}\0", 3, 0);
    xp_safetensors *st;
    assert_int_equal(xp_safetensors_parse(f.bytes, f.n, "f", &st), XP_E_FORMAT);
    has("header byte 2: byte 0x00, expected nothing but spaces");
    free(f.bytes);
}

static void metadata(void **state) {
    (void)state;
    refused("{\"__metadata__\":{\"a\":\"1\"},\"__metadata__\":{\"b\":\"1\"}}", 0, "f: __metadata__ is given twice");
    refused("{\"__metadata__\":{\"a\":\"1\",\"b\":\"\",\"\\u0061\":\"1\"}}", 0,
            "f: __metadata__: key 'a' is given twice");
    refused("{\"__metadata__\":{\"a\":1}}", 0, "expected a text ('\"') as the value of __metadata__'s 'a'");
    refused("{\"__metadata__\":{\"a\":{\"b\":\"c\"}}}", 0, "expected a text ('\"') as the value of __metadata__'s 'a'");
    refused("{\"__metadata__\":null}", 0, "header byte 16: 'n', expected '{' of __metadata__");
    refused("{\"__metadata__\":[]}", 0, "expected '{' of __metadata__");
    refused("{\"__metadata__\":{\"a\":\"1\",}}", 0, "expected a key of __metadata__");
    refused("{\"__metadata__\":{\"a\":\"1\"]}", 0, "expected ',' or '}' in __metadata__");
    taken("{\"\\u005f_metadata__\":{\"a\":\"1\"}}", 0);
}

/* A name as it stands between its quotes. */
static void name_is(const char *written, const char *text) {
    char header[2304];
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", written);
    if (text)
        refused(header, 0, text);
    else
        taken(header, 0);
}

static void names(void **state) {
    (void)state;
    char longest[1026];
    memset(longest, 'n', 1025);
    longest[1025] = '\0';
    name_is(longest, "nnn...' has 1025 bytes, expected at most 1024");
    name_is(longest + 1, NULL);
    name_is("\\u0000", "header byte 8: before it stands NUL (\\u0000) in a text");
    name_is("a\\u0000b", "NUL (\\u0000)");
    name_is("\\u00e9\xc3\xa9\xe5\x90\x8d\xf0\x9f\x98\x80\\ud83d\\ude00\\uD83D\\uDE00", NULL);
    name_is("\\ud800", "half of a surrogate pair");
    name_is("\\udc00", "half of a surrogate pair");
    name_is("\\udc00\\udc00", "half of a surrogate pair");
    name_is("\\ud800\\ud800", "the high half of a surrogate pair without its low half");
    name_is("\\ud800\\u0041", "the high half of a surrogate pair without its low half");
    name_is("\\ud800x", "half of a surrogate pair");
    name_is("\\u12", "expected four hexadecimal digits");
    name_is("\\u12g4", "expected four hexadecimal digits");
    name_is("\\x41", "expected one of \" \\ / b f n r t u after a backslash");
    name_is("\t", "expected no control character in a text");
    name_is("\x1f", "expected no control character in a text");
    name_is("\x7f", NULL);
    static const char *const bad[] = {"\xff",
                                      "\xc0\x80",
                                      "\xc1\xbf",
                                      "\x80",
                                      "\xc3",
                                      "\xc3x",
                                      "\xe0\x9f\xbf",
                                      "\xed\xa0\x80",
                                      "\xed\xbf\xbf",
                                      "\xf0\x8f\xbf\xbf",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "\xe5\x90",
                                      "\xf0\x9f\x98"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        name_is(bad[i], ", expected UTF-8");
    name_is("\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf\xf0\x90\x80\x80\xe0\xa0\x80\xc2\x80", NULL);
    /* what a name holds does not reach a terminal */
    name_is("\\u001b[2J\":0,\"", "tensor '\\x1b[2J'");
}

static void escapes_are_undone(void **state) {
    (void)state;
    xp_safetensors *st;
    assert_int_equal(
        parse("{\"__metadata__\":{\"k\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u20ac\\ud83d\\ude00\\uFFFF\\u07ff\"}}", 0, &st),
        XP_OK);
    assert_string_equal(xp_safetensors_metadata(st, "k"),
                        "\"\\/\b\f\n\r\t\xe2\x82\xac\xf0\x9f\x98\x80\xef\xbf\xbf\xdf\xbf");
    xp_safetensors_close(st);
}

static void lengths(void **state) {
    (void)state;
    static const struct {
        uint64_t n;
        const char *text;
    } row[] = {
        {9, "f: header length is 9, but 8 bytes follow it"},
        {100000000, "f: header length is 100000000, but 8 bytes follow it"},
        {100000001, "f: header length is 100000001, expected at most 100000000"},
        {~0ull, "f: header length is 18446744073709551615, expected at most 100000000"},
        {~0ull - 7, "f: header length is 18446744073709551608, expected at most"},
        {(uint64_t)1 << 63, "f: header length is 9223372036854775808, expected at most"},
        {(uint64_t)1 << 32 | 8, "f: header length is 4294967304, expected at most"},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        xp_safetensors *st;
        file f = make_as(row[i].n, "{}      ", 8, 0);
        assert_int_equal(xp_safetensors_parse(f.bytes, f.n, "f", &st), XP_E_FORMAT);
        has(row[i].text);
        free(f.bytes);
    }
    for (size_t n = 0; n < 8; n++) {
        xp_safetensors *st;
        char text[80];
        unsigned char *bytes = calloc(1, n ? n : 1);
        assert_int_equal(xp_safetensors_parse(bytes, n, "f", &st), XP_E_FORMAT);
        snprintf(text, sizeof text, "f: is %zu bytes, expected at least the 8 of the header's length", n);
        has(text);
        free(bytes);
    }
}

/* One tensor more than is taken; and exactly as many are. */
static void too_many_tensors(void **state) {
    (void)state;
    const size_t each = 64, n = 8 + 1 + each * (XP_SAFETENSORS_MAX_TENSORS + 1) + 1;
    char *bytes = malloc(n + 1);
    assert_non_null(bytes);
    for (size_t extra = 0; extra < 2; extra++) {
        const size_t tensors = XP_SAFETENSORS_MAX_TENSORS + extra;
        char *p = bytes + 8;
        *p++ = '{';
        for (size_t i = 0; i < tensors; i++)
            p += sprintf(p, "%s\"%zx\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}", i ? "," : "", i);
        *p++ = '}';
        const size_t header = (size_t)(p - bytes) - 8;
        for (int i = 0; i < 8; i++)
            bytes[i] = (char)(header >> (8 * i) & 0xff);
        xp_safetensors *st;
        const xp_status status = xp_safetensors_parse(bytes, header + 8, "f", &st);
        assert_int_equal(status, extra ? XP_E_FORMAT : XP_OK);
        if (extra)
            has("f: tensor 'f4240' is one more than the 1000000 that are taken");
        else
            assert_int_equal(xp_safetensors_count(st), XP_SAFETENSORS_MAX_TENSORS);
        xp_safetensors_close(st);
    }
    free(bytes);
}

/* ---- bytes ---- */

static float three[3] = {1.0f, -2.0f, 0.5f};
static uint8_t codes[2] = {0x21, 0x43};
static int64_t wide[2] = {-1, 7};
static uint16_t halves[6] = {0, 1, 2, 3, 4, 5};
static uint8_t bytes3[3] = {9, 8, 7};

/* What safetensors 0.8.0's own serialize() gives for the same tensors; its texts come in an order left to chance, of
 * which this is the one by key. */
static const char canonical[] =
    "\xd0\x01\0\0\0\0\0\0"
    "{\"__metadata__\":{\"a\":\"\\t\\b\\f\\r\\n\\u001f\x7f/\",\"expar.stage\":\"x\xc3\xbc\"},"
    "\"in.b\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]},"
    "\"\\\"\\\\\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[16,20]},"
    "\"in.a\":{\"dtype\":\"F32\",\"shape\":[3,1],\"data_offsets\":[20,32]},"
    "\"h\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[32,40]},"
    "\"u\":{\"dtype\":\"U8\",\"shape\":[0,3],\"data_offsets\":[40,40]},"
    "\"v\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[40,43]},"
    "\"q\":{\"dtype\":\"F4\",\"shape\":[1,4],\"data_offsets\":[43,45]}}"
    "   "
    "\xff\xff\xff\xff\xff\xff\xff\xff\x07\0\0\0\0\0\0\0"
    "\0\0\x80\x3f"
    "\0\0\x80\x3f\0\0\0\xc0\0\0\0\x3f"
    "\0\0\1\0\3\0\4\0"
    "\x09\x08\x07"
    "\x21\x43";

static void write_canonical(const char *path, int backwards) {
    const int64_t four[2] = {1, 4};
    xp_tensor strided = xp_tensor_2d(halves, XP_BF16, 2, 2); /* columns 0 and 1 of 3 */
    strided.stride[0] = 3;
    const xp_safetensors_item item[] = {
        {"in.a", xp_tensor_2d(three, XP_F32, 3, 1)},    {"q", xp_tensor_of(codes, XP_E2M1, 2, four)},
        {"v", xp_tensor_1d(bytes3, XP_U8, 3)},          {"h", strided},
        {"in.b", xp_tensor_1d(wide, XP_I64, 2)},        {"u", xp_tensor_2d(bytes3, XP_U8, 0, 3)},
        {"\"\\", xp_tensor_of(three, XP_F32, 0, four)},
    };
    const xp_safetensors_text text[] = {{"expar.stage", "x\xc3\xbc"}, {"a", "\t\b\f\r\n\x1f\x7f/"}};
    xp_safetensors_item reverse[7];
    for (int i = 0; i < 7; i++)
        reverse[i] = item[6 - i];
    const xp_safetensors_text swapped[] = {text[1], text[0]};
    assert_int_equal(xp_safetensors_write(path, backwards ? reverse : item, 7, backwards ? swapped : text, 2), XP_OK);
}

static size_t slurp(const char *path, unsigned char *buf, size_t bytes) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    const size_t n = fread(buf, 1, bytes, f);
    fclose(f);
    return n;
}

static void canonical_bytes(void **state) {
    (void)state;
    unsigned char got[1024];
    for (int backwards = 0; backwards < 2; backwards++) {
        write_canonical(in_folder("canon"), backwards);
        const size_t n = slurp(in_folder("canon"), got, sizeof got);
        got[n] = 0;
        if (n != sizeof canonical - 1 || memcmp(got, canonical, n) != 0)
            fail_msg("%zu bytes, expected %zu: %s", n, sizeof canonical - 1, (char *)got + 8);
    }
    assert_int_equal(xp_safetensors_write(in_folder("canon"), NULL, 0, NULL, 0), XP_OK);
    assert_int_equal(slurp(in_folder("canon"), got, sizeof got), 16);
    assert_memory_equal(got, "\x08\0\0\0\0\0\0\0{}      ", 16);
    const xp_safetensors_text one = {"k", ""};
    assert_int_equal(xp_safetensors_write(in_folder("canon"), NULL, 0, &one, 1), XP_OK);
    assert_int_equal(slurp(in_folder("canon"), got, sizeof got), 40);
    assert_memory_equal(got, "\x20\0\0\0\0\0\0\0{\"__metadata__\":{\"k\":\"\"}}       ", 40);
    const xp_safetensors_item alone = {"a", xp_tensor_1d(bytes3, XP_U8, 1)};
    assert_int_equal(xp_safetensors_write(in_folder("canon"), &alone, 1, NULL, 0), XP_OK);
    assert_int_equal(slurp(in_folder("canon"), got, sizeof got), 65);
    assert_memory_equal(got + 8, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}   \x09", 57);
    unlink(in_folder("canon"));
}

static void round_trip(void **state) {
    (void)state;
    xp_safetensors *st;
    xp_tensor t;
    write_canonical(in_folder("trip"), 0);
    assert_int_equal(xp_safetensors_open(in_folder("trip"), &st), XP_OK);
    assert_int_equal(xp_safetensors_count(st), 7);
    assert_string_equal(xp_safetensors_metadata(st, "a"), "\t\b\f\r\n\x1f\x7f/");
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "in.a"), &t), XP_OK);
    assert_int_equal(t.dtype, XP_F32);
    assert_int_equal(t.dim[0], 3);
    assert_memory_equal(t.data, three, sizeof three);
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "in.b"), &t), XP_OK);
    assert_memory_equal(t.data, wide, sizeof wide);
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "h"), &t), XP_OK);
    const uint16_t want[4] = {0, 1, 3, 4};
    assert_memory_equal(t.data, want, sizeof want);
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "q"), &t), XP_OK);
    assert_int_equal(t.dtype, XP_E2M1);
    assert_int_equal(t.dim[1], 4);
    assert_int_equal(xp_code(t.data, XP_E2M1, 3), 4);
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "\"\\"), &t), XP_OK);
    assert_int_equal(t.ndim, 0);
    /* the file is cut while it is open: an error, not a signal */
    assert_int_equal(truncate(in_folder("trip"), 424), 0);
    assert_int_equal(xp_safetensors_view(st, xp_safetensors_find(st, "v"), &t), XP_E_IO);
    has("it was cut while it was read");
    xp_safetensors_close(st);
    unlink(in_folder("trip"));
}

static void damaged_files(void **state) {
    (void)state;
    const size_t n = sizeof canonical - 1;
    xp_safetensors *st;
    for (size_t cut = 0; cut < n; cut++) {
        unsigned char *part = malloc(cut ? cut : 1); /* of exactly that size, for the sanitizers */
        assert_non_null(part);
        memcpy(part, canonical, cut);
        assert_int_equal(xp_safetensors_parse(part, cut, "f", &st), XP_E_FORMAT);
        assert_null(st);
        free(part);
        FILE *f = fopen(in_folder("cut"), "wb");
        assert_non_null(f);
        assert_int_equal(fwrite(canonical, 1, cut, f), cut);
        fclose(f);
        assert_int_equal(xp_safetensors_open(in_folder("cut"), &st), XP_E_FORMAT);
        assert_null(st);
    }
    unlink(in_folder("cut"));
    int refusals = 0;
    for (size_t i = 0; i < n; i++) {
        for (int bit = 0; bit < 8; bit++) {
            unsigned char *copy = malloc(n);
            assert_non_null(copy);
            memcpy(copy, canonical, n);
            copy[i] = (unsigned char)(copy[i] ^ 1 << bit);
            const xp_status status = xp_safetensors_adopt(copy, n, "f", &st);
            assert_true(status == XP_OK || status == XP_E_FORMAT);
            refusals += status != XP_OK;
            for (int64_t k = 0; status == XP_OK && k < xp_safetensors_count(st); k++) {
                xp_tensor t;
                xp_safetensors_view(st, k, &t);
            }
            xp_safetensors_close(st);
        }
    }
    assert_true(refusals > 1000);
}

static void files(void **state) {
    (void)state;
    xp_safetensors *st;
    assert_int_equal(xp_safetensors_open(in_folder("none"), &st), XP_E_IO);
    has("none: cannot open: No such file");
    assert_null(st);
    assert_int_equal(xp_safetensors_open(folder, &st), XP_E_IO);
    has("is a folder, expected a regular file");
    assert_int_equal(mkfifo(in_folder("fifo"), 0600), 0);
    assert_int_equal(xp_safetensors_open(in_folder("fifo"), &st), XP_E_IO);
    has("is a FIFO, a socket or a device, expected a regular file");
    unlink(in_folder("fifo"));
    assert_int_equal(xp_safetensors_open("/dev/zero", &st), XP_E_IO);
    /* 1 TiB of nothing behind a header that asks for it: nothing is allocated for it */
    static const char big[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1099511627776],\"data_offsets\":[0,1099511627775]}}";
    file f = make_as(sizeof big - 1, big, sizeof big - 1, 0);
    FILE *out = fopen(in_folder("big"), "wb");
    assert_non_null(out);
    fwrite(f.bytes, 1, f.n, out);
    fclose(out);
    free(f.bytes);
    assert_int_equal(xp_safetensors_open(in_folder("big"), &st), XP_E_FORMAT);
    has("1099511627775 bytes, expected 1099511627776");
    unlink(in_folder("big"));
}

/* ---- what cannot be written ---- */

static void not_written(const xp_safetensors_item *item, int64_t items, const xp_safetensors_text *text, int64_t texts,
                        const char *why) {
    assert_int_equal(xp_safetensors_write(in_folder("bad"), item, items, text, texts), XP_E_ARG);
    has(why);
    assert_int_equal(access(in_folder("bad"), F_OK), -1);
}

static void writer_refuses(void **state) {
    (void)state;
    const xp_tensor t = xp_tensor_1d(three, XP_F32, 3);
    char longest[1026];
    memset(longest, 'n', 1025);
    longest[1025] = '\0';
    const xp_safetensors_item twice[] = {{"a", t}, {"b", t}, {"a", t}};
    not_written(twice, 3, NULL, 0, "tensor 'a' is given twice");
    xp_safetensors_item x = {longest, t};
    not_written(&x, 1, NULL, 0, "the name has 1025 bytes, expected UTF-8 of at most 1024");
    x.name = "\xff";
    not_written(&x, 1, NULL, 0, "expected UTF-8");
    x.name = "__metadata__";
    not_written(&x, 1, NULL, 0, "not __metadata__");
    x.name = "x";
    x.tensor.data = NULL;
    not_written(&x, 1, NULL, 0, "tensor 'x': has no data, expected host memory");
    x.tensor = t;
    x.tensor.mem = XP_CUDA;
    not_written(&x, 1, NULL, 0, "tensor 'x': lies on a device");
    x.tensor = t;
    x.tensor.dtype = XP_NDTYPE;
    not_written(&x, 1, NULL, 0, "expected a dtype");
    x.tensor = t;
    x.tensor.ndim = 5;
    not_written(&x, 1, NULL, 0, "5 dimensions, expected a dtype and at most 4");
    x.tensor = t;
    x.tensor.dim[0] = -1;
    not_written(&x, 1, NULL, 0, "dim 0 is -1, expected 0 to");
    const int64_t huge[3] = {0, (int64_t)1 << 53, (int64_t)1 << 53};
    x.tensor = t;
    x.tensor.ndim = 3;
    memcpy(x.tensor.dim, huge, sizeof huge);
    not_written(&x, 1, NULL, 0, "dim 2 is 9007199254740992");
    x.tensor = xp_tensor_1d(codes, XP_E2M1, 3);
    not_written(&x, 1, NULL, 0, "3 codes of 4 bits, expected a contiguous even number");
    x.tensor = xp_tensor_2d(codes, XP_E2M1, 2, 1);
    x.tensor.stride[0] = 2;
    not_written(&x, 1, NULL, 0, "2 codes of 4 bits with gaps");
    const xp_safetensors_text same[] = {{"k", "1"}, {"j", "1"}, {"k", "2"}};
    not_written(NULL, 0, same, 3, "metadata 'k' is given twice");
    const xp_safetensors_text latin = {"k", "\xe9"};
    not_written(NULL, 0, &latin, 1, "metadata 'k': expected UTF-8");
    not_written(NULL, -1, NULL, 0, "-1 tensors");
    /* a folder stands where the file should go: nothing is left behind */
    assert_int_equal(mkdir(in_folder("sub"), 0700), 0);
    assert_int_equal(xp_safetensors_write(in_folder("sub"), NULL, 0, NULL, 0), XP_E_IO);
    has("sub: cannot replace: ");
    char temp[64];
    snprintf(temp, sizeof temp, "sub.tmp%ld.0", (long)getpid());
    assert_int_equal(access(in_folder(temp), F_OK), -1);
    assert_int_equal(rmdir(in_folder("sub")), 0);
    assert_int_equal(xp_safetensors_write(in_folder("sub/x"), NULL, 0, NULL, 0), XP_E_IO);
    has("sub/x: cannot create: ");
}

static int open_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

/* Fails when a test, or a write that failed, left a file. */
static int close_folder(void **state) {
    xp_safetensors *st;
    (void)state;
    if (parse("{}", 0, &st) == XP_OK)
        xp_safetensors_close(st);
    return rmdir(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_are_read),
        cmocka_unit_test(every_dtype),
        cmocka_unit_test(shapes),
        cmocka_unit_test(overflow),
        cmocka_unit_test(numbers),
        cmocka_unit_test(fields),
        cmocka_unit_test(offsets),
        cmocka_unit_test(header_form),
        cmocka_unit_test(metadata),
        cmocka_unit_test(names),
        cmocka_unit_test(escapes_are_undone),
        cmocka_unit_test(lengths),
        cmocka_unit_test(too_many_tensors),
        cmocka_unit_test(canonical_bytes),
        cmocka_unit_test(round_trip),
        cmocka_unit_test(damaged_files),
        cmocka_unit_test(files),
        cmocka_unit_test(writer_refuses),
    };
    return cmocka_run_group_tests(tests, open_folder, close_folder);
}
