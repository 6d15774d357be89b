#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    kube2ram_authenticator_fuzz::review::check(data);
});
