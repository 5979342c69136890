//! Results and units keep their meaning over the wire.

use hutch_proto::units::{ByteSize, Millis};
use hutch_proto::{Captured, Reason, Status, Timestamp};
use proptest::prelude::*;

#[test]
fn names_on_the_wire_are_those_of_as_str() {
    for status in Status::ALL {
        assert_eq!(serde_json::to_value(status).expect("json"), status.as_str());
    }
    for reason in Reason::ALL {
        assert_eq!(serde_json::to_value(reason).expect("json"), reason.as_str());
    }
}

#[test]
fn output_is_text_where_it_can_be() {
    let text = Captured { data: b"hi".to_vec(), bytes: 2, truncated: false };
    assert_eq!(serde_json::to_string(&text).expect("json"), r#"{"text":"hi","bytes":2,"truncated":false}"#);
    let binary = Captured { data: vec![0xff, 0], bytes: 2, truncated: false };
    assert_eq!(
        serde_json::to_string(&binary).expect("json"),
        r#"{"base64":"/wA=","bytes":2,"truncated":false}"#
    );
    let cut = Captured { data: "aé".as_bytes()[..2].to_vec(), bytes: 9, truncated: true };
    assert_eq!(serde_json::to_string(&cut).expect("json"), r#"{"text":"a","bytes":9,"truncated":true}"#);
}

/// What would take more than twice its bytes as text goes as base64, and is the same afterwards.
#[test]
fn large_text_goes_as_text_unless_it_is_mostly_control_characters() {
    let (small, large) = (Captured::LARGE_TEXT, Captured::LARGE_TEXT + 1);
    for (data, form) in [
        (vec![0; small], "text"),
        (vec![0; large], "base64"),
        (vec![b'a'; large], "text"),
        (vec![b'\n'; large], "text"),
        (b"y\n".repeat(large), "text"),
        ([vec![0; large / 5], vec![b'a'; large]].concat(), "text"),
        ([vec![0; large / 3], vec![b'a'; large]].concat(), "base64"),
        ("é".repeat(large).into_bytes(), "text"),
        (vec![0xff; small], "base64"),
    ] {
        let captured = Captured { bytes: data.len() as u64, data, truncated: false };
        let wire = serde_json::to_string(&captured).expect("json");
        assert!(wire.starts_with(&format!("{{\"{form}\":\"")), "{}", &wire[..20]);
        let around = format!("{{\"{form}\":\"\",\"bytes\":{},\"truncated\":false}}", captured.bytes);
        assert_eq!(wire.len(), around.len() + captured.wire_bytes());
        assert_eq!(captured, serde_json::from_str::<Captured>(&wire).expect("captured"));
    }
}

#[test]
fn a_cut_keeps_what_fits() {
    const MOST: usize = 400 << 10;
    let mixed = [vec![0; 1 << 20], vec![0xff]].concat();
    let late = [vec![b'a'; 1 << 20], vec![0xff]].concat();
    for (data, kept) in [
        (vec![b'a'; 1 << 20], MOST),
        (vec![0; 1 << 20], MOST / 4 * 3),
        (vec![0xff; 1 << 20], MOST / 4 * 3),
        ("é".repeat(1 << 19).into_bytes(), MOST),
        (mixed, MOST / 4 * 3),
        (late, MOST / 4 * 3),
        (vec![b'\n'; 1 << 20], MOST / 2),
        ([vec![b'a'; 700 << 10], vec![0; 700 << 10]].concat(), MOST),
        ([vec![0; 512 << 10], vec![b'a'; 1 << 20]].concat(), MOST / 4 * 3),
    ] {
        let mut captured = Captured { bytes: data.len() as u64, data, truncated: false };
        captured.cut_to(MOST);
        assert!(captured.truncated);
        assert_eq!(captured.data.len(), kept);
        assert!(captured.wire_bytes() <= MOST);
    }
    let mut nuls = Captured { data: vec![0; 1000], bytes: 1000, truncated: false };
    nuls.cut_to(60);
    assert_eq!(nuls.data.len(), 10, "short text stays text");
    nuls.cut_to(60);
    assert_eq!(nuls.data.len(), 10);
}

#[test]
fn human_units() {
    assert_eq!("256MiB".parse(), Ok(ByteSize(268_435_456)));
    assert_eq!("1.5kB".parse(), Ok(ByteSize(1500)));
    assert_eq!(ByteSize(268_435_456).to_string(), "256MiB");
    assert_eq!("5s".parse(), Ok(Millis(5000)));
    assert_eq!("250".parse(), Ok(Millis(250)));
    assert_eq!(Millis(90_000).to_string(), "1m 30s");
    assert!("much".parse::<ByteSize>().expect_err("no size").contains("256MiB"));
    assert!("soon".parse::<Millis>().expect_err("no time").contains("5s"));
}

proptest! {
    #[test]
    fn a_moment_survives_the_wire(ms in 0i64..253_402_300_799_999) {
        let moment = Timestamp::from_unix_ms(ms);
        prop_assert_eq!(moment.to_string().parse(), Ok(moment));
    }

    #[test]
    fn output_survives_the_wire(data in prop::collection::vec(any::<u8>(), 0..200)) {
        let captured = Captured { bytes: data.len() as u64, data, truncated: false };
        let wire = serde_json::to_string(&captured).expect("json");
        prop_assert_eq!(captured, serde_json::from_str::<Captured>(&wire).expect("captured"));
    }
}
