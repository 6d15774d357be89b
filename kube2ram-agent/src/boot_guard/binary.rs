//! Whether an executable needs a dynamic linker. Pure; called by `boot_guard`.

/// Returns whether the bytes are a 64-bit little-endian ELF executable without an interpreter (elf(5));
/// everything else is treated as one that needs libraries.
pub(super) fn is_static(elf: &[u8]) -> bool {
    const MAGIC: &[u8] = b"\x7fELF\x02\x01";
    const PT_INTERP: u32 = 3;
    if !elf.starts_with(MAGIC) {
        return false;
    }
    let (Some(offset), Some(size), Some(count)) = (u64_at(elf, 32), u16_at(elf, 54), u16_at(elf, 56)) else {
        return false;
    };
    (0..usize::from(count)).all(|index| {
        let header =
            usize::try_from(offset).ok().and_then(|start| start.checked_add(index * usize::from(size)));
        header.and_then(|header| u32_at(elf, header)).is_some_and(|kind| kind != PT_INTERP)
    })
}

fn bytes_at<const N: usize>(elf: &[u8], offset: usize) -> Option<[u8; N]> {
    elf.get(offset..)?.first_chunk().copied()
}

fn u16_at(elf: &[u8], offset: usize) -> Option<u16> {
    bytes_at(elf, offset).map(u16::from_le_bytes)
}

fn u32_at(elf: &[u8], offset: usize) -> Option<u32> {
    bytes_at(elf, offset).map(u32::from_le_bytes)
}

fn u64_at(elf: &[u8], offset: usize) -> Option<u64> {
    bytes_at(elf, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header and its program headers, of these types.
    pub(in super::super) fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            elf.extend(kind.to_le_bytes());
            elf.extend([0; 52]);
        }
        elf
    }

    #[test]
    fn an_interpreter_makes_it_dynamic() {
        assert!(is_static(&elf(&[1, 2, 6])));
        assert!(!is_static(&elf(&[6, 3, 1])));
        assert!(!is_static(&std::fs::read("/proc/self/exe").unwrap()), "tests are linked dynamically");
    }

    #[test]
    fn what_is_no_whole_executable_is_not_static() {
        let whole = elf(&[1]);

        assert!(
            !is_static(b"#!/bin/sh")
                && !is_static(b"")
                && !is_static(&whole[..60])
                && !is_static(&whole[..64])
        );
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes: Vec<u8>) {
            is_static(&bytes);
            bytes.splice(0..0, *b"\x7fELF\x02\x01");
            is_static(&bytes);
        }
    }
}
