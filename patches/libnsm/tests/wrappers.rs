// SPDX-License-Identifier: Apache-2.0

//! The C functions as a C program calls them, over a device that is this program's own `ioctl`: the dynamic linker's
//! rules give it precedence over the C library's, so the code under test needs no seam.

use std::cell::RefCell;
use std::ptr::{null, null_mut};

use aws_nitro_enclaves_nsm_api::api::{Digest, ErrorCode, Request, Response};
use aws_nitro_enclaves_nsm_api::cpython::*;

const FD: i32 = 77; // any number will do: nothing but the ioctl below looks at it
const ROOM: usize = 0x3000;
const UNTOUCHED: u8 = 0xA5;

type Answer = Result<Vec<u8>, i32>;
type Device = Box<dyn FnMut(&[u8]) -> Answer>;

thread_local! {
    static DEVICE: RefCell<Device> = RefCell::new(Box::new(|_| Err(libc::ENODEV)));
    static CALLS: RefCell<usize> = const { RefCell::new(0) };
}

#[repr(C)]
struct Raw {
    request: *const u8,
    request_len: u64,
    response: *mut u8,
    response_len: u64,
}

/// What linux/drivers/misc/nsm.c does: bound the request, truncate the answer, write its length back.
#[no_mangle]
unsafe extern "C" fn ioctl(fd: i32, command: libc::c_ulong, raw: *mut Raw) -> i32 {
    assert_eq!((fd, command as u32), (FD, 0xC020_0A00));
    let raw = &mut *raw;
    assert!(raw.request_len <= 0x1000 && raw.response_len == ROOM as u64);
    CALLS.with(|calls| *calls.borrow_mut() += 1);
    let request = std::slice::from_raw_parts(raw.request, raw.request_len as usize);
    match DEVICE.with(|device| device.borrow_mut()(request)) {
        Ok(answer) => {
            let length = answer.len().min(ROOM);
            std::ptr::copy_nonoverlapping(answer.as_ptr(), raw.response, length);
            raw.response_len = answer.len() as u64;
            0
        }
        Err(errno) => {
            *libc::__errno_location() = errno;
            -1
        }
    }
}

fn device(answer: impl FnMut(&[u8]) -> Answer + 'static) {
    DEVICE.with(|device| *device.borrow_mut() = Box::new(answer));
    CALLS.with(|calls| *calls.borrow_mut() = 0);
}

fn answers(response: Response) {
    let bytes = serde_cbor::to_vec(&response).unwrap();
    device(move |_| Ok(bytes.clone()));
}

fn calls() -> usize {
    CALLS.with(|calls| *calls.borrow())
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

/// The status, the length afterwards and the whole buffer of a call with `capacity` bytes of room.
fn call(
    capacity: usize,
    function: impl FnOnce(*mut u8, *mut usize) -> i32,
) -> (i32, usize, Vec<u8>) {
    let (mut buffer, mut length) = (vec![UNTOUCHED; ROOM], capacity);
    let status = function(buffer.as_mut_ptr(), &mut length);
    (status, length, buffer)
}

fn attest(buffer: *mut u8, length: *mut usize) -> i32 {
    unsafe { nsmpy_attest(FD, null(), 0, null(), 0, null(), 0, buffer, length) }
}

fn describe(buffer: *mut u8, length: *mut usize) -> i32 {
    unsafe { nsmpy_describe(FD, buffer, length) }
}

fn describe_pcr(buffer: *mut u8, length: *mut usize) -> i32 {
    unsafe { nsmpy_describe_pcr(FD, 3, &mut 0, buffer, length) }
}

fn extend_pcr(buffer: *mut u8, length: *mut usize) -> i32 {
    unsafe { nsmpy_extend_pcr(FD, 4, [1, 2, 3].as_ptr(), 3, buffer, length) }
}

fn random(buffer: *mut u8, length: *mut usize) -> i32 {
    unsafe { nsmpy_random(FD, buffer, length) }
}

type Function = fn(*mut u8, *mut usize) -> i32;
const WITH_OUTPUT: [Function; 5] = [describe, describe_pcr, extend_pcr, attest, random];

/// Every function, its output thrown away.
fn statuses() -> Vec<i32> {
    let mut all: Vec<i32> = WITH_OUTPUT
        .iter()
        .map(|function| call(ROOM, function).0)
        .collect();
    all.extend([nsmpy_lock_pcr(FD, 5), nsmpy_lock_pcrs(FD, 16)]);
    all
}

fn description(module_id: &str) -> Response {
    Response::DescribeNSM {
        version_major: 1,
        version_minor: 2,
        version_patch: 3,
        module_id: module_id.into(),
        max_pcrs: 32,
        locked_pcrs: [0, 1].into(),
        digest: Digest::SHA384,
    }
}

fn value_of(function: Function) -> Response {
    let data = vec![9; 48];
    match WITH_OUTPUT
        .iter()
        .position(|&other| std::ptr::fn_addr_eq(other, function))
        .unwrap()
    {
        0 => description("i-abc"),
        1 => Response::DescribePCR { lock: true, data },
        2 => Response::ExtendPCR { data },
        3 => Response::Attestation { document: data },
        _ => Response::GetRandom { random: data },
    }
}

#[test]
fn requests_are_the_bytes_of_the_protocol() {
    let expected = [
        "6b44657363726962654e534d",
        "a16b4465736372696265504352a165696e64657803",
        "a169457874656e64504352a265696e64657804646461746143010203",
        "a16b4174746573746174696f6ea369757365725f64617461f6656e6f6e6365f66a7075626c69635f6b6579f6",
        "6947657452616e646f6d",
        "a1674c6f636b504352a165696e64657805",
        "a1684c6f636b50435273a16572616e676510",
    ];
    let mut expected = expected.map(bytes).into_iter();
    device(move |request| {
        assert_eq!(request, expected.next().unwrap());
        Ok(bytes("a1654572726f726c496e76616c6964496e646578"))
    });
    assert_eq!(statuses(), [2; 7]);
    assert_eq!(calls(), 7);
}

#[test]
fn answers_are_delivered() {
    answers(description("i-abc"));
    let (status, length, buffer) = call(ROOM, describe);
    assert_eq!(status, 0);
    let answer: Response = serde_cbor::from_slice(&buffer[..length]).unwrap();
    assert_eq!(format!("{answer:?}"), format!("{:?}", description("i-abc")));

    answers(Response::DescribePCR {
        lock: true,
        data: bytes("aabb"),
    });
    let mut locked = 7;
    let (status, length, buffer) = call(2, |buffer, length| unsafe {
        nsmpy_describe_pcr(FD, 3, &mut locked, buffer, length)
    });
    assert_eq!(
        (status, length, &buffer[..3], locked),
        (0, 2, &[0xAA, 0xBB, UNTOUCHED][..], 1)
    );

    answers(Response::LockPCR);
    assert_eq!(nsmpy_lock_pcr(FD, 5), 0);
    answers(Response::LockPCRs);
    assert_eq!(nsmpy_lock_pcrs(FD, 0xFFFF), 0);
}

#[test]
fn absent_and_empty_inputs_differ() {
    device(|request| {
        let request: Request = serde_cbor::from_slice(request).unwrap();
        let Request::Attestation {
            user_data,
            nonce,
            public_key,
        } = request
        else {
            panic!("{request:?}")
        };
        assert_eq!(user_data.as_deref(), Some(&vec![9, 9]));
        assert_eq!(nonce.as_deref(), Some(&vec![]));
        assert_eq!(public_key, None);
        Ok(serde_cbor::to_vec(&Response::Attestation { document: vec![] }).unwrap())
    });
    let (status, length, _) = call(0, |buffer, length| unsafe {
        nsmpy_attest(
            FD,
            [9, 9].as_ptr(),
            2,
            [0].as_ptr(),
            0,
            null(),
            0,
            buffer,
            length,
        )
    });
    assert_eq!((status, length), (0, 0));
}

#[test]
fn a_short_buffer_holds_nothing_and_learns_the_size() {
    for function in WITH_OUTPUT {
        answers(value_of(function));
        let (status, needed, full) = call(ROOM, function);
        assert_eq!(status, 0);
        assert!(full[needed..].iter().all(|&byte| byte == UNTOUCHED));
        for capacity in 0..needed {
            let (status, length, buffer) = call(capacity, function);
            assert_eq!((status, length), (NSMPY_SHORT_BUFFER, needed));
            assert!(buffer.iter().all(|&byte| byte == UNTOUCHED));
        }
        let (status, length, buffer) = call(needed, function);
        assert_eq!((status, length, buffer), (0, needed, full));
        assert_eq!(calls(), needed + 2); // each of them reached the device: the operation has happened
    }
}

#[test]
fn a_short_buffer_leaves_the_lock_alone() {
    answers(Response::DescribePCR {
        lock: true,
        data: vec![9; 48],
    });
    let mut locked = 7;
    let (status, ..) = call(47, |buffer, length| unsafe {
        nsmpy_describe_pcr(FD, 3, &mut locked, buffer, length)
    });
    assert_eq!((status, locked), (NSMPY_SHORT_BUFFER, 7));
}

#[test]
fn null_and_absurd_outputs_never_reach_the_device() {
    answers(Response::LockPCR);
    for function in WITH_OUTPUT {
        let (mut buffer, mut length) = ([UNTOUCHED; 64], 64);
        assert_eq!(function(null_mut(), &mut length), 1);
        assert_eq!(length, 64);
        assert_eq!(function(null_mut(), &mut 0), 1);
        assert_eq!(function(buffer.as_mut_ptr(), null_mut()), 1);
        for mut absurd in [isize::MAX as usize + 1, usize::MAX] {
            let before = absurd;
            assert_eq!(function(buffer.as_mut_ptr(), &mut absurd), 1);
            assert_eq!(absurd, before);
        }
        assert_eq!(buffer, [UNTOUCHED; 64]);
    }
    assert_eq!(
        call(ROOM, |b, l| unsafe {
            nsmpy_describe_pcr(FD, 3, null_mut(), b, l)
        })
        .0,
        1
    );
    assert_eq!(calls(), 0);
}

#[test]
fn null_and_absurd_inputs_never_reach_the_device() {
    answers(Response::LockPCR);
    let one = [1_u8];
    for (data, length) in [
        (null(), 1),
        (null(), usize::MAX),
        (one.as_ptr(), 0x1001),
        (one.as_ptr(), usize::MAX),
    ] {
        for position in 0..3 {
            let mut inputs = [(null(), 0); 3];
            inputs[position] = (data, length);
            let [(user, user_len), (nonce, nonce_len), (key, key_len)] = inputs;
            let (status, length, _) = call(ROOM, |buffer, room| unsafe {
                nsmpy_attest(
                    FD, user, user_len, nonce, nonce_len, key, key_len, buffer, room,
                )
            });
            assert_eq!((status, length), (1, ROOM));
        }
        assert_eq!(
            call(ROOM, |b, l| unsafe {
                nsmpy_extend_pcr(FD, 4, data, length, b, l)
            })
            .0,
            1
        );
    }
    assert_eq!(
        call(ROOM, |b, l| unsafe {
            nsmpy_extend_pcr(FD, 4, null(), 0, b, l)
        })
        .0,
        1
    );
    for index in [0x1_0000, u32::MAX] {
        assert_eq!(nsmpy_lock_pcr(FD, index), 1);
        assert_eq!(nsmpy_lock_pcrs(FD, index), 1);
        assert_eq!(
            call(ROOM, |b, l| unsafe {
                nsmpy_describe_pcr(FD, index, &mut 0, b, l)
            })
            .0,
            1
        );
        assert_eq!(
            call(ROOM, |b, l| unsafe {
                nsmpy_extend_pcr(FD, index, one.as_ptr(), 1, b, l)
            })
            .0,
            1
        );
    }
    assert_eq!(calls(), 0);
}

#[test]
fn a_request_beyond_the_limit_is_too_large() {
    answers(Response::ExtendPCR { data: vec![9; 48] });
    let data = [0_u8; 0x1000];
    let extend = |length| {
        call(ROOM, |buffer, room| unsafe {
            nsmpy_extend_pcr(FD, 4, data.as_ptr(), length, buffer, room)
        })
        .0
    };
    let largest = (0..=0x1000)
        .rev()
        .find(|&length| extend(length) == 0)
        .unwrap();
    assert_eq!(calls(), 1);
    assert_eq!(0x1000 - largest, 27); // names, index and headers of ExtendPCR
    assert_eq!(extend(largest + 1), 7);
    assert_eq!(calls(), 1);
}

#[test]
fn every_error_answer_is_its_number() {
    use ErrorCode::*;
    for (name, number) in [
        ("InvalidArgument", InvalidArgument as i32),
        ("InvalidIndex", InvalidIndex as i32),
        ("InvalidResponse", InvalidResponse as i32),
        ("ReadOnlyIndex", ReadOnlyIndex as i32),
        ("InvalidOperation", InvalidOperation as i32),
        ("BufferTooSmall", BufferTooSmall as i32),
        ("InputTooLarge", InputTooLarge as i32),
        ("InternalError", InternalError as i32),
    ] {
        let mut answer = bytes("a1654572726f72");
        answer.push(0x60 + name.len() as u8);
        answer.extend(name.as_bytes());
        device(move |_| Ok(answer.clone()));
        assert_eq!(statuses(), [number; 7], "{name}");
    }
}

#[test]
fn every_errno_is_its_negative() {
    for errno in 1..134 {
        if errno != libc::EINTR {
            device(move |_| Err(errno));
            assert_eq!(statuses(), [-errno; 7]);
            assert_eq!(calls(), 7);
        }
    }
}

#[test]
fn a_failure_without_errno_is_no_success() {
    device(|_| Err(0));
    assert_eq!(statuses(), [-libc::EIO; 7]);
}

#[test]
fn an_interrupted_call_is_made_again() {
    let mut interruptions = 3;
    device(move |_| {
        interruptions -= 1;
        if interruptions >= 0 {
            Err(libc::EINTR)
        } else {
            Ok(bytes("674c6f636b504352"))
        }
    });
    assert_eq!(nsmpy_lock_pcr(FD, 5), 0);
    assert_eq!(calls(), 4);
}

#[test]
fn an_answer_that_is_no_answer_is_refused() {
    let invalid = [
        "a1654572726f726753756363657373",           // Error: Success
        "a1654572726f726455676868",                 // Error: Ughh
        "6455676868",                               // a name that is not ours
        "a0",                                       // no entry
        "00",                                       // not a name at all
        "a169457874656e64504352a0",                 // a field is missing
        "a16947657452616e646f6da16672616e646f6d01", // a field of another type
    ];
    for answer in invalid.map(bytes) {
        device(move |_| Ok(answer.clone()));
        assert_eq!(statuses(), [3; 7]);
    }
    for answer in [
        "",
        "a1",
        "674c6f636b50435200",
        "ff",
        "5bffffffffffffffff",
        "9bffffffffffffffff",
    ]
    .map(bytes)
    {
        device(move |_| Ok(answer.clone()));
        assert_eq!(statuses(), [8; 7]);
    }
}

#[test]
fn an_answer_to_another_question_is_refused() {
    answers(Response::LockPCRs);
    assert_eq!(statuses(), [3, 3, 3, 3, 3, 3, 0]);
    answers(Response::LockPCR);
    assert_eq!(statuses(), [3, 3, 3, 3, 3, 0, 3]);
}

#[test]
fn a_truncated_or_changed_answer_never_passes_for_another_kind() {
    let golden = bytes("a16b4174746573746174696f6ea168646f63756d656e7442d284");
    for length in 0..golden.len() {
        let answer = golden[..length].to_vec();
        device(move |_| Ok(answer.clone()));
        assert_eq!(call(ROOM, attest).0, 8);
    }
    for bit in 0..golden.len() * 8 {
        let mut answer = golden.clone();
        answer[bit / 8] ^= 1 << (bit % 8);
        device(move |_| Ok(answer.clone()));
        let (status, length, _) = call(ROOM, attest);
        assert!(
            matches!(status, 0 | 3 | 8) && (status != 0 || length <= golden.len()),
            "bit {bit}: {status}"
        );
    }
}

#[test]
fn a_length_beyond_the_buffer_is_not_believed() {
    let mut answer = bytes("a16b4174746573746174696f6ea168646f63756d656e74593000");
    answer.resize(answer.len() + 0x3000, 1); // 12288 bytes of document, truncated by the buffer of 12288 in all
    device(move |_| Ok(answer.clone()));
    assert_eq!(call(ROOM, attest).0, 8);
}

#[test]
fn the_largest_answer_fits() {
    let document: Vec<u8> = (0..12262_u32).map(|number| number as u8).collect();
    answers(Response::Attestation {
        document: document.clone(),
    });
    let (status, length, buffer) = call(ROOM, attest);
    assert_eq!((status, &buffer[..length]), (0, &document[..]));
}

#[test]
fn a_panic_becomes_a_status() {
    let silent = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    assert_eq!(guarded(8, || panic!("inside")), 8);
    assert_eq!(
        guarded(-libc::EIO, || Ok([5].into_iter().nth(1).unwrap())),
        -libc::EIO
    );
    std::panic::set_hook(silent);
}

#[test]
fn threads_get_their_own_answers() {
    let threads = (0..16).map(|number| {
        std::thread::spawn(move || {
            for round in 0..200_u8 {
                answers(Response::Attestation {
                    document: vec![number ^ round; 4000 + usize::from(number)],
                });
                let (status, length, buffer) = call(ROOM, attest);
                assert_eq!((status, length), (0, 4000 + usize::from(number)));
                assert!(buffer[..length].iter().all(|&byte| byte == number ^ round));
            }
        })
    });
    threads
        .collect::<Vec<_>>()
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

#[test]
fn opening_and_closing_tell_the_errno() {
    assert_eq!(nsmpy_close(-1), -libc::EBADF);
    let expected = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/nsm");
    match (nsmpy_open(), expected) {
        (fd, Ok(_)) => assert_eq!(nsmpy_close(fd), 0),
        (status, Err(error)) => assert_eq!(Some(-status), error.raw_os_error()),
    }
}

#[test]
fn the_interface_has_a_version() {
    assert_eq!(
        (nsmpy_abi_version(), NSMPY_ABI_VERSION, NSMPY_SHORT_BUFFER),
        (1, 1, 100)
    );
}
