//! No bytes make the parser panic, and what it takes survives the wire.
#![no_main]

use hutch_proto::JobSpec;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(spec) = JobSpec::parse(bytes) {
        let wire = serde_json::to_vec(&spec).expect("a spec is JSON");
        assert_eq!(JobSpec::parse(&wire).expect("what was taken is taken again"), spec);
    }
});
