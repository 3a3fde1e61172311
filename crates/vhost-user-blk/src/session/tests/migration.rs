//! The dirty log switched on and off, and when the disk is released.

use super::*;

const LOGGING: u64 = WITH_PROTOCOL | config::F_LOG_ALL;
/// Bytes of a log for the memory of these tests.
const LOG_LEN: u64 = (GUEST_BASE + MEMORY_LEN) / 4096 / 8;

fn set_protocol_features(rig: &mut Rig) {
    rig.session.set_protocol_features(PROTOCOL_FEATURES.bits()).unwrap();
}

fn running() -> Rig {
    let mut rig = Rig::running(WITH_PROTOCOL);
    set_protocol_features(&mut rig);
    rig
}

fn set_log(rig: &mut Rig, len: u64) -> Result<()> {
    let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    rig.session.set_log_base(&VhostUserLog::new(len, 0), file)
}

/// Where the ring that was started last logs its used ring.
fn logged_at(rig: &Rig) -> Option<u64> {
    rig.started.lock().unwrap().as_ref().unwrap().log.as_ref().map(|log| log.used)
}

fn set_addr_logged(rig: &mut Rig, log: u64) -> Result<()> {
    let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG;
    rig.session.set_vring_addr(0, flags, VMM_BASE, VMM_BASE + 0x2000, VMM_BASE + 0x1000, log)
}

#[test]
fn the_log_is_switched_on_and_off_under_a_running_ring() {
    let mut rig = running();
    set_log(&mut rig, LOG_LEN).unwrap();
    assert_eq!(rig.take(), [], "it is not in use yet");
    rig.session.set_features(LOGGING).unwrap();
    assert_eq!(rig.take(), [stop(), start(TAKEN)]);
    assert_eq!(logged_at(&rig), Some(gpa(0x2000).0));
    // It was assumed already.
    set_addr_logged(&mut rig, gpa(0x2000).0).unwrap();
    assert_eq!(rig.take(), []);
    set_addr_logged(&mut rig, 0x3000).unwrap();
    assert_eq!(rig.take(), [stop(), start(2 * TAKEN)]);
    assert_eq!(logged_at(&rig), Some(0x3000));
    set_log(&mut rig, 2 * LOG_LEN).unwrap();
    assert_eq!(rig.take(), [stop(), start(3 * TAKEN)]);
    rig.session.set_features(WITH_PROTOCOL).unwrap();
    assert_eq!(rig.take(), [stop(), start(4 * TAKEN)]);
    assert_eq!(logged_at(&rig), None);
    rig.session.set_features(WITH_PROTOCOL).unwrap();
    assert_eq!(rig.take(), []);
}

#[test]
fn a_ring_starts_when_its_log_has_come() {
    let mut rig = Rig::new();
    set_protocol_features(&mut rig);
    for step in Step::ALL {
        rig.step(step, LOGGING);
    }
    assert_eq!(rig.take(), []);
    set_log(&mut rig, LOG_LEN).unwrap();
    assert_eq!(rig.take(), [start(0)]);
    assert!(logged_at(&rig).is_some());
}

#[test]
fn a_log_that_ends_before_memory_does_is_refused() {
    let mut rig = running();
    let why = reason(set_log(&mut rig, LOG_LEN - 1));
    assert!(why.contains("dirty log of 63 bytes; 64 are needed"), "{why}");
    // One that was long enough for what there was.
    let mut rig = running();
    set_log(&mut rig, LOG_LEN).unwrap();
    rig.session.set_features(LOGGING).unwrap();
    let regions = [region(0), region(MEMORY_LEN)];
    let why = reason(rig.session.set_mem_table(&regions, vec![file(), file()], None));
    assert!(why.contains("dirty log"), "{why}");
    for at in [8 * 4096 * LOG_LEN - 1029, u64::MAX] {
        let mut rig = running();
        set_log(&mut rig, LOG_LEN).unwrap();
        rig.session.set_features(LOGGING).unwrap();
        let why = reason(set_addr_logged(&mut rig, at));
        assert!(why.contains("dirty log"), "{why}");
    }
}

#[test]
fn the_disk_is_let_go_when_the_last_ring_stops_under_a_log() {
    let mut rig = running();
    rig.session.get_vring_base(0).unwrap();
    assert_eq!(rig.take(), [stop()], "a guest that resets keeps its disk");

    let mut rig = running();
    set_log(&mut rig, LOG_LEN).unwrap();
    rig.session.set_features(LOGGING).unwrap();
    rig.take();
    // As QEMU does it.
    rig.session.set_vring_enable(0, false).unwrap();
    assert_eq!(rig.take(), [stop(), Call::LetGo]);
    rig.session.get_vring_base(0).unwrap();
    rig.session.set_features(WITH_PROTOCOL).unwrap();
    assert_eq!(rig.take(), [], "once is enough");
    // The guest stays.
    rig.step(Step::Kick, 0);
    rig.step(Step::Enable, 0);
    assert_eq!(rig.take(), [start(2 * TAKEN)]);
    rig.session.get_vring_base(0).unwrap();
    assert_eq!(rig.take(), [stop()]);
}

#[test]
fn the_disk_is_kept_as_long_as_another_ring_runs() {
    let mut rig = running();
    set_log(&mut rig, LOG_LEN).unwrap();
    rig.session.set_features(LOGGING).unwrap();
    rig.session.set_vring_num(1, 128).unwrap();
    let flags = VhostUserVringAddrFlags::empty();
    rig.session
        .set_vring_addr(1, flags, VMM_BASE, VMM_BASE + 0x2000, VMM_BASE + 0x1000, 0)
        .unwrap();
    rig.session.set_vring_kick(1, Some(eventfd())).unwrap();
    rig.session.set_vring_enable(1, true).unwrap();
    rig.take();
    rig.session.get_vring_base(0).unwrap();
    assert_eq!(rig.take(), [stop()]);
    rig.session.get_vring_base(1).unwrap();
    assert_eq!(rig.take(), [Call::Stop { queue: 1 }, Call::LetGo]);
}

#[test]
fn a_shortened_log_ends_the_session() {
    let mut rig = running();
    let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(LOG_LEN).unwrap();
    let short = file.try_clone().unwrap();
    rig.session.set_log_base(&VhostUserLog::new(LOG_LEN, 0), file).unwrap();
    rig.session.set_features(LOGGING).unwrap();
    short.set_len(0).unwrap();
    // The access that a worker would make.
    let log = rig.started.lock().unwrap().take().unwrap().log.unwrap();
    log.mark_used(0, 1);
    assert!(rig.session.check().unwrap_err().to_string().contains("dirty log"));
    assert!(reason(rig.session.get_vring_base(0)).contains("shortened"));
}

#[test]
fn a_frontend_that_takes_every_feature_and_knows_no_log_is_served() {
    let mut rig = Rig::new();
    for step in Step::ALL {
        rig.step(step, LOGGING);
    }
    assert_eq!(rig.take(), [start(0)]);
    rig.session.get_vring_base(0).unwrap();
    assert_eq!(rig.take(), [stop()]);
}
