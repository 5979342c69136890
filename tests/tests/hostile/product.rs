//! The product has no switch for its defences.

use hutch_sandbox::Defence;
use hutch_tests::hutch::{Home, binary, can_run};
use serde_json::json;

#[test]
fn no_defence_of_the_product_can_be_taken_away() {
    let program = std::fs::read(binary()).unwrap();
    let has = |program: &[u8], word: &str| program.windows(word.len()).any(|bytes| bytes == word.as_bytes());
    assert!(!has(&program, "HUTCH_WITHOUT"), "the product reads the variable");
    if let Ok(weak) = hutch_tests::hutch::weak_binary() {
        assert!(has(&std::fs::read(weak).unwrap(), "HUTCH_WITHOUT"), "this test would not see it");
    }
    if !can_run("defences of the product") {
        return;
    }
    let all: Vec<_> = Defence::ALL.iter().map(|defence| defence.name()).collect();
    let home = Home::new();
    let mut command = home.command();
    command.env("HUTCH_WITHOUT", all.join(","));
    let spec = json!({"layers": ["host"], "command": ["grep", "-E", "^(CapEff|NoNewPrivs|Seccomp):", "/proc/self/status"]});
    let result = home.run_with(command, &spec).unwrap();
    let said = String::from_utf8_lossy(&result.stdout.data);
    assert_eq!(said, "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n");
}
