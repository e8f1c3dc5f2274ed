"""The keywords of OpenSSH's client, which an inventory may hold beside rbee's own."""

CURRENT = frozenset(
    """
AddKeysToAgent AddressFamily BatchMode BindAddress BindInterface CASignatureAlgorithms CanonicalDomains
CanonicalizeFallbackLocal CanonicalizeHostname CanonicalizeMaxDots CanonicalizePermittedCNAMEs CertificateFile
ChannelTimeout CheckHostIP Ciphers ClearAllForwardings Compression ConnectTimeout ConnectionAttempts ControlMaster
ControlPath ControlPersist DynamicForward EnableEscapeCommandline EnableSSHKeysign EscapeChar ExitOnForwardFailure
FingerprintHash ForkAfterAuthentication ForwardAgent ForwardX11 ForwardX11Timeout ForwardX11Trusted
GSSAPIAuthentication GSSAPIDelegateCredentials GatewayPorts GlobalKnownHostsFile HashKnownHosts Host HostKeyAlgorithms
HostKeyAlias HostbasedAcceptedAlgorithms HostbasedAuthentication HostName IPQoS IdentitiesOnly IdentityAgent
IdentityFile IgnoreUnknown Include KbdInteractiveAuthentication KbdInteractiveDevices KexAlgorithms KnownHostsCommand
LocalCommand LocalForward LogLevel LogVerbose MACs Match NoHostAuthenticationForLocalhost NumberOfPasswordPrompts
ObscureKeystrokeTiming PKCS11Provider PasswordAuthentication PermitLocalCommand PermitRemoteOpen Port
PreferredAuthentications ProxyCommand ProxyJump ProxyUseFdpass PubkeyAcceptedAlgorithms PubkeyAuthentication
RefuseConnection RekeyLimit RemoteCommand RemoteForward RequestTTY RequiredRSASize RevokedHostKeys SecurityKeyProvider
SendEnv ServerAliveCountMax ServerAliveInterval SessionType SetEnv StdinNull StreamLocalBindMask StreamLocalBindUnlink
StrictHostKeyChecking SyslogFacility TCPKeepAlive Tag Tunnel TunnelDevice UpdateHostKeys User UserKnownHostsFile
VerifyHostKeyDNS VersionAddendum VisualHostKey WarnWeakCrypto XAuthLocation
""".split()  # noqa: SIM905 - a list of 104 strings is harder to read and to compare with the manual
)
"""Those of ssh_config(5) of OpenSSH 10, as the manual writes them."""

_OLDER = """
afstokenpassing challengeresponseauthentication cipher compressionlevel dsaauthentication fallbacktorsh
globalknownhostsfile2 gssapiclientidentity gssapikexalgorithms gssapikeyexchange gssapirenewalforcesrekey
gssapiserveridentity gssapitrustdns hostbasedalgorithms hostbasedkeytypes identityfile2 keepalive
kerberosauthentication kerberostgtpassing protocol pubkeyacceptedkeytypes rhostsauthentication rhostsrsaauthentication
rsaauthentication skeyauthentication smartcarddevice tisauthentication useprivilegedport userknownhostsfile2
useroaming usersh zeroknowledgepasswordauthentication
"""
"""Those that only older versions, or Debian's and Red Hat's GSSAPI patch, know or accept."""

OPENSSH = frozenset(_OLDER.split()) | {name.lower() for name in CURRENT}
"""All of them since 3.0, in lower case."""
