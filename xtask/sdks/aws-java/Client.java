import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.URI;
import software.amazon.awssdk.http.urlconnection.UrlConnectionHttpClient;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.regions.providers.DefaultAwsRegionProviderChain;
import software.amazon.awssdk.services.sts.StsClient;

/**
 * Makes a signed call as the SDK does by itself; each line of input asks once more: `new` with a new client, `kept` with the one that
 * lives as long as the process, `region` for the region that the SDK finds by itself. Arguments: where STS is (host:port), the region.
 * Prints JSON lines.
 */
final class Client {
  public static void main(String[] args) throws Exception {
    var lines = new BufferedReader(new InputStreamReader(System.in));
    StsClient kept = null;
    for (var line = lines.readLine(); line != null; line = lines.readLine()) {
      if (line.equals("region")) {
        var region = DefaultAwsRegionProviderChain.builder().build().getRegion().id();
        System.out.println(String.format("{\"Region\": \"%s\", \"Version\": \"%s\"}", region, version()));
        continue;
      }
      var begun = System.nanoTime();
      var isKept = line.equals("kept");
      var client = isKept && kept != null ? kept : create(args[0], args[1]);
      if (isKept) {
        kept = client;
      }
      var arn = client.getCallerIdentity().arn();
      var millis = (System.nanoTime() - begun) / 1_000_000;
      System.out.println(String.format("{\"Arn\": \"%s\", \"Millis\": %d, \"Version\": \"%s\"}", arn, millis, version()));
    }
    System.exit(0);
  }

  private static StsClient create(String sts, String region) {
    return StsClient.builder()
        .endpointOverride(URI.create("http://" + sts))
        .httpClientBuilder(UrlConnectionHttpClient.builder())
        .region(Region.of(region))
        .build();
  }

  /** The name of the jar that the SDK was loaded from tells its version. */
  private static String version() {
    var jar = StsClient.class.getProtectionDomain().getCodeSource().getLocation().getPath();
    return jar.replaceAll(".*/sts-|\\.jar$", "");
  }
}
