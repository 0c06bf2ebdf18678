// Makes a passkey and shows its line for policy.toml. Nothing of it is sent or stored: a server that could put the line
// in place could also put in another one. WebAuthn Level 3 section 5.1.3; no CBOR, the browser decodes the key.
"use strict";

(() => {
  const ALGORITHMS = [-7, -8]; // ES256, EdDSA: what policy.toml takes
  const FIVE_MINUTES = 300_000; // milliseconds
  const SAFE = /^[A-Za-z0-9_.:\/-]+$/; // what needs no escape in TOML
  const byId = (id) => document.getElementById(id);
  const place = byId("enrol");
  const make = byId("make");
  const host = location.hostname;

  const base64 = (bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes))).replace(/=+$/, "");
  const base64url = (bytes) => base64(bytes).replaceAll("+", "-").replaceAll("/", "_");

  function show(id, text) {
    byId(id).textContent = text;
    byId(id).hidden = false;
  }

  // Why no passkey can be made on this page; empty if one can.
  function obstacle() {
    if (/^[0-9.]+$/.test(host) || host.startsWith("[")) {
      const here = host.startsWith("127.") || host === "[::1]";
      return "Browsers make no passkeys on pages of IP addresses. Open this page by its name" +
        (here ? `: http://localhost:${location.port}${location.pathname}` : ".");
    }
    if (!window.isSecureContext) {
      return "Browsers make passkeys on pages with https only, and on http://localhost.";
    }
    if (host !== "localhost" && !host.includes(".")) {
      return `The name ${host} has no domain. Open this page by its full name, such as signer.example.org.`;
    }
    return window.PublicKeyCredential ? "" : "This browser has no passkeys.";
  }

  function sentence(error) {
    switch (error.name) {
      case "NotAllowedError":
        return "No passkey was made: it was cancelled, or took too long.";
      case "NotSupportedError":
      case "ConstraintError":
        return "This device cannot be used: it has to verify you by fingerprint, face or PIN, and to sign with " +
          "ES256 or EdDSA. Use another one.";
      default:
        return `No passkey was made: ${error.message}`;
    }
  }

  async function enrol() {
    const random = (count) => crypto.getRandomValues(new Uint8Array(count));
    const name = place.dataset.identity;
    const credential = await navigator.credentials.create({
      publicKey: {
        rp: { id: host, name: "signer" },
        user: { id: random(16), name, displayName: name },
        challenge: random(32), // nobody verifies the answer: policy.toml is edited by a human who compares the fingerprint
        pubKeyCredParams: ALGORITHMS.map((alg) => ({ type: "public-key", alg })),
        authenticatorSelection: { residentKey: "preferred", userVerification: "required" },
        attestation: "none",
        timeout: FIVE_MINUTES,
      },
    });
    const key = credential.response.getPublicKey();
    if (!key || !ALGORITHMS.includes(credential.response.getPublicKeyAlgorithm())) {
      throw new DOMException("its key is neither ES256 nor EdDSA", "NotSupportedError");
    }
    const made = { id: credential.id, public_key: base64url(key), rp: host, origin: location.origin };
    if (!Object.values(made).every((value) => SAFE.test(value))) {
      throw new Error("the address of this page has letters that policy.toml does not take");
    }
    const digest = await crypto.subtle.digest("SHA-256", key);
    show("enrolment", JSON.stringify(made));
    show("line", `approval_keys = [{ kind = "webauthn", id = "${made.id}", public_key = "${made.public_key}", ` +
      `rp = "${made.rp}", origins = ["${made.origin}"] }]`);
    show("fingerprint", `SHA256:${base64(digest)}`);
    byId("made").hidden = false;
    byId("made-heading").focus();
  }

  make.addEventListener("click", async () => {
    make.disabled = true;
    byId("fault").hidden = true;
    try {
      await enrol();
    } catch (error) {
      show("fault", sentence(error));
    }
    make.disabled = false;
  });

  for (const button of document.querySelectorAll("[data-copies]")) {
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(byId(button.dataset.copies).textContent);
        show("copied", "Copied.");
      } catch {
        show("copied", "The browser does not let this page copy: mark the text and copy it.");
      }
    });
  }

  show("rp", host);
  show("origin", location.origin);
  place.hidden = false;
  const why = obstacle();
  make.disabled = why !== "";
  if (why) show("fault", why);
})();
