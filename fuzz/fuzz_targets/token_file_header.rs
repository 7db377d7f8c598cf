#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    hgct_fuzz::token_file_header(bytes);
});
