//! What a thread that was taken over could do with its ring.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use ::io_uring::{IoUring, Probe};

use super::*;
use crate::ring::uring::{OPERATIONS, PLACES, REGISTER_FILES_UPDATE};

const FIXED_FILE: u8 = 1 << 0;
const ASYNC: u8 = 1 << 4;
/// A place without a file.
#[expect(clippy::cast_possible_truncation)]
const EMPTY: i32 = PLACES as i32 - 1;

#[test]
fn every_operation_but_seven_is_refused() {
    needs_io_uring!();
    let mut probe = Probe::new();
    IoUring::new(8).unwrap().submitter().register_probe(&mut probe).unwrap();
    let mut uring = io_uring().unwrap();
    let (mut allowed, mut refused) = (0, 0);
    for code in 0..=u8::MAX {
        let result = -uring.attempt(code, FIXED_FILE, EMPTY).unwrap();
        if OPERATIONS.iter().any(|(of_ours, _)| *of_ours == code) {
            // The kernel goes as far as looking for the file, or for the poll to remove.
            assert!([libc::EBADF, libc::ENOENT].contains(&result), "{code}: {result}");
            allowed += 1;
        } else if probe.is_supported(code) {
            assert_eq!(result, libc::EACCES, "{code}");
            refused += 1;
        } else {
            assert!([libc::EACCES, libc::EINVAL].contains(&result), "{code}: {result}");
        }
    }
    assert!(allowed == 7 && refused > 20, "{allowed} {refused}");
}

#[test]
fn a_descriptor_that_is_not_registered_is_refused() {
    needs_io_uring!();
    let mut uring = io_uring().unwrap();
    let file = file_of(b"content");
    for (code, name) in OPERATIONS {
        for flags in [0, ASYNC] {
            let result = uring.attempt(code, flags, file.as_raw_fd()).unwrap();
            assert_eq!(result, -libc::EACCES, "{name}");
        }
    }
}

#[test]
fn so_are_chains_of_operations_and_chosen_buffers() {
    needs_io_uring!();
    let mut uring = io_uring().unwrap();
    let read = OPERATIONS[0].0;
    for bit in 0..8 {
        let result = uring.attempt(read, FIXED_FILE | 1 << bit, EMPTY).unwrap();
        let expected = match 1 << bit {
            FIXED_FILE | ASYNC => -libc::EBADF,
            // A bit that means nothing yet.
            0x80 => -libc::EINVAL,
            _ => -libc::EACCES,
        };
        assert_eq!(result, expected, "bit {bit}");
    }
}

#[test]
fn nothing_but_files_can_be_registered() {
    needs_io_uring!();
    let uring = io_uring().unwrap();
    for opcode in (0..64).filter(|opcode| *opcode != u32::from(REGISTER_FILES_UPDATE)) {
        let error = uring.attempt_register(opcode).unwrap_err().raw_os_error();
        // The kernel says EINVAL to numbers that it does not know.
        let is_known = opcode <= 20;
        assert!(
            error == Some(libc::EACCES) || !is_known && error == Some(libc::EINVAL),
            "{opcode}: {error:?}"
        );
    }
}

/// The last reference to a pipe's writing end is that of the ring.
#[test]
fn a_ring_that_ends_gives_up_its_files() {
    needs_io_uring!();
    let mut uring = io_uring();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let (mut watched, watched_writer) = std::io::pipe().unwrap();
    let mut ring: Ring<'_, ()> =
        Ring::new(uring.as_mut(), 1, &[None, Some(writer.as_fd())]).unwrap();
    ring.watch(watched_writer.as_fd(), Watch(2)).unwrap();
    ring.enter(false).unwrap();
    drop(ring);
    drop((writer, watched_writer));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(watched.read(&mut [0]).unwrap(), 0);
}

/// Its descriptors are signalled all the time while their polls are removed.
#[test]
fn one_ring_after_the_other_hears_nothing_of_the_last() {
    needs_io_uring!();
    let mut uring = io_uring();
    let content = pattern(512);
    let file = file_of(&content);
    let (old, new) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                old.write(1).unwrap();
            }
        });
        for _ in 0..300 {
            let mut ring: Ring<'_, ()> = ring_over(&mut uring, 1, &file);
            (0..4).for_each(|watch| ring.watch(old.as_fd(), Watch(watch)).unwrap());
            ring.enter(true).unwrap();
            drop(ring);

            let mut ring = ring_over(&mut uring, 1, &file);
            ring.watch(new.as_fd(), Watch(4)).unwrap();
            let mut buffer = [0; 512];
            let mut plan = Plan::default();
            plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut buffer)]);
            // SAFETY: the buffer outlives the request, which is waited for.
            unsafe { ring.submit((), &mut plan) }.unwrap();
            let mut done = false;
            while !done {
                ring.enter(true).unwrap();
                while let Some(event) = ring.next_event() {
                    assert!(matches!(event, Event::Done((), Ok(()))), "{event:?}");
                    done = true;
                }
            }
            assert_eq!(buffer[..], content);
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn more_files_or_watches_than_places_are_an_error_and_leave_the_ring_usable() {
    needs_io_uring!();
    let mut uring = io_uring();
    let file = file_of(&pattern(16));
    let mut files = vec![Some(file.as_fd()); FILES_MAX + 1];
    assert!(Ring::<()>::new(uring.as_mut(), 1, &files).is_err());
    files.pop();
    let mut ring = Ring::<()>::new(uring.as_mut(), 1, &files).unwrap();
    let last = u32::try_from(WATCHES_MAX).unwrap();
    let event = EventFd::from_value(1).unwrap();
    assert!(ring.watch(event.as_fd(), Watch(last)).is_err());
    ring.watch(event.as_fd(), Watch(last - 1)).unwrap();
    ring.enter(true).unwrap();
    assert!(matches!(ring.next_event(), Some(Event::Ready(Watch(found))) if found == last - 1));
}
