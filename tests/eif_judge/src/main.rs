//! Prints, as JSON, what AWS's crate reads in an enclave image file, by the names of `nitro-cli describe-eif`.

use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::{get_pcrs, PcrSignatureChecker};
use serde_json::{json, Value};
use sha2::{Digest, Sha384};

fn main() {
    let path = std::env::args().nth(1).expect("usage: eif_judge FILE");
    match describe(&path) {
        Ok(shown) => println!("{shown:#}"),
        Err(message) => {
            eprintln!("eif_judge: {message}");
            std::process::exit(1);
        }
    }
}

fn describe(path: &str) -> Result<Value, String> {
    let mut reader = EifReader::from_eif(path.to_string())?;
    let pcrs = get_pcrs(
        &mut reader.image_hasher,
        &mut reader.bootstrap_hasher,
        &mut reader.app_hasher,
        &mut reader.cert_hasher,
        Sha384::new(),
        reader.signature_section.is_some(),
    )?;
    let mut shown = json!({
        "EifVersion": reader.get_header().version,
        "Measurements": pcrs,
        "IsSigned": pcrs.contains_key("PCR8"),
        "CheckCRC": reader.check_crc(),
    });
    if pcrs.contains_key("PCR8") {
        let certificate = reader.get_certificate_info(pcrs)?;
        PcrSignatureChecker::from_eif(path)?.verify()?;
        shown["SigningCertificate"] = json!(certificate);
        shown["SignatureCheck"] = json!(reader.sign_check);
    }
    if let Some(metadata) = reader.get_metadata() {
        let mut told = json!(metadata.build_info);
        told["DockerInfo"] = metadata.docker_info;
        if let Value::Object(custom) = metadata.custom_info {
            for (name, value) in custom {
                told[name] = value;
            }
        }
        shown["ImageName"] = json!(metadata.img_name);
        shown["ImageVersion"] = json!(metadata.img_version);
        shown["Metadata"] = told;
    }
    Ok(shown)
}
