use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;

use hutch_proto::{Content, JobSpec, Reason};

use super::message::{ASK_FDS, Ask, job_of, job_parts, report_of, report_parts};
use super::wire::{LinkError, MAX_PACKET, Message, decode, receive, send};
use super::*;
use crate::observe::SlotGauges;
use crate::refusal::Refusal;
use crate::report::Report;

const MOST: u64 = 1 << 20;

fn received(socket: &PacketSocket) -> Result<Option<Message<Ask>>, LinkError> {
    receive::<Ask, ASK_FDS>(socket, &mut vec![0; MAX_PACKET], MOST)
}

#[test]
fn messages_of_all_sizes_arrive() {
    let (here, there) = PacketSocket::pair().expect("sockets");
    for size in [0, 1, MAX_PACKET - 60, MAX_PACKET, 500_000] {
        let parts = vec![vec![7; size], vec![8]];
        send(&here, &Message { parts: parts.clone(), ..Message::of(Ask::Run { run: 1, slot: 2 }) })
            .expect("sent");
        let message = received(&there).expect("received").expect("a message");
        assert_eq!((message.what, message.parts), (Ask::Run { run: 1, slot: 2 }, parts));
        assert!(message.fds.is_empty());
    }
    drop(here);
    assert!(received(&there).expect("the end").is_none());
}

#[test]
fn what_is_too_large_is_refused_before_it_is_read() {
    let (here, there) = PacketSocket::pair().expect("sockets");
    let parts = vec![vec![0; 2 << 20]];
    send(&here, &Message { parts, ..Message::of(Ask::TakeDown { slot: 0 }) }).expect("sent");
    assert!(matches!(received(&there), Err(LinkError::Wrong("it is too large"))));
    here.send(&vec![0; MAX_PACKET + 1], &[]).expect("sent");
    assert!(matches!(received(&there), Err(LinkError::Socket(_))));
}

#[test]
fn hostile_bytes_and_descriptors_are_refused() {
    let (here, there) = PacketSocket::pair().expect("sockets");
    let null = File::open("/dev/null").expect("null");
    let mut plain = tempfile::tempfile().expect("file");
    plain.write_all(&[0; 100]).expect("write");
    let (pipe, _write) = nix::unistd::pipe().expect("pipe");
    for fd in [null.as_fd(), plain.as_fd(), pipe.as_fd()] {
        here.send(&[1], &[fd]).expect("sent");
        assert!(matches!(received(&there), Err(LinkError::Wrong("its body can still change"))));
    }
    here.send(&[1], &[null.as_fd(); ASK_FDS + 1]).expect("sent");
    assert!(received(&there).is_err(), "more descriptors than it may bring");
    let lying: &[&[u8]] = &[
        &[],
        &[1],
        &[2, 0],
        &[0],
        &[0, 1, 2],
        &[0, 255, 255, 255, 255, 0],
        &[0, 1, 0, 0, 0, 99],
        // Ask::TakeDown { slot: 0 } with a part of 2^63 bytes.
        &[0, 13, 0, 0, 0, 2, 0, 1, 128, 128, 128, 128, 128, 128, 128, 128, 128, 1],
        // The same with as many parts.
        &[0, 12, 0, 0, 0, 2, 0, 255, 255, 255, 255, 255, 255, 255, 255, 127, 0],
    ];
    for packet in lying.iter().filter(|packet| !packet.is_empty()) {
        here.send(packet, &[]).expect("sent");
        assert!(received(&there).is_err(), "{packet:?}");
    }
}

#[test]
fn every_cut_of_a_message_is_refused() {
    let (here, there) = PacketSocket::pair().expect("sockets");
    let parts = vec![b"ab".to_vec(), b"cde".to_vec()];
    send(&here, &Message { parts, ..Message::of(Ask::Gauges { ticket: 300 }) }).expect("sent");
    let mut packet = vec![0; MAX_PACKET];
    let (length, _) = there.receive::<0>(&mut packet).expect("received").expect("a packet");
    let body = &packet[1..length];
    assert!(decode::<Ask>(body, body.len() as u64).is_ok());
    for end in 0..body.len() {
        assert!(decode::<Ask>(&body[..end], end as u64).is_err(), "{end}");
    }
    let longer = [body, &[0]].concat();
    assert!(decode::<Ask>(&longer[..], longer.len() as u64).is_err());
}

#[test]
fn a_job_is_the_same_on_the_other_side() {
    let spec = br#"{"layers": ["host"], "stdin": {"text": "in"}, "files": [{"path": "/a", "base64": "AP8=", "mode": "0600"}],
        "steps": [{"name": "s", "command": ["true"], "stdin": {"text": "step"}}, {"name": "t", "command": ["true"]}]}"#;
    let job = JobSpec::parse(spec).expect("spec");
    let parts = job_parts(job.clone()).expect("parts");
    assert_eq!(parts[1..], [b"in".to_vec(), vec![0, 255], b"step".to_vec()]);
    assert_eq!(job_of(parts.clone()).expect("job"), job);
    assert_eq!(job.files[0].content, Content::inline([0, 255]));
    for wrong in [parts[..3].to_vec(), [parts.clone(), vec![Vec::new()]].concat(), Vec::new()] {
        assert!(job_of(wrong).is_err());
    }
}

#[test]
fn a_job_that_no_spec_could_be_is_refused() {
    let json = br#"{"layers": ["host"], "command": ["true"], "privileged": true}"#.to_vec();
    assert!(job_of(vec![json]).expect_err("unknown field").contains("privileged"));
    let json = br#"{"layers": [], "command": ["true"]}"#.to_vec();
    assert!(job_of(vec![json]).is_err());
}

#[test]
fn a_report_is_the_same_on_the_other_side() {
    let report = Report::without_run(Refusal::host("no room"));
    let again = report_of(report_parts(report).expect("parts").0, Vec::new()).expect("report");
    assert_eq!((again.reason, again.message.as_str()), (Some(Reason::HostError), "no room"));
}

#[test]
fn gauges_are_the_same_on_the_other_side() {
    let mut gauges = SlotGauges {
        slot: 3,
        memory_bytes: 4,
        io_write_bytes: 5,
        memory_file_bytes: 6,
        ..SlotGauges::default()
    };
    gauges.pressure_us[5] = Some(("io", "full", 6));
    let wire: message::WireGauges = gauges.into();
    assert_eq!(SlotGauges::from(wire), gauges);
}
